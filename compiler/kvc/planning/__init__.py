"""What to keep of every layer and how many tokens to compute at once, by predicted time under the budget."""
