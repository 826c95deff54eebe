"""Target-independent IR -> IR passes of kvc, one a file, and the nouns they share (`facts`)."""
