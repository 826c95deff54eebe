"""onnxruntime-genai on the fp32 model of its own builder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.engines.protocol import serve


class OrtGenai:
    def prepare(self, model: str, threads: int, **options: Any) -> dict[str, str]:
        import onnxruntime_genai as og

        path = Path(model) / "genai_config.json"
        config = json.loads(path.read_text())
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        path.write_text(json.dumps(config, indent=2))
        self.og = og
        self.model = og.Model(model)
        self.generator: Any = None
        return {"version": og.__version__, "configuration": "fp32 model of its builder, last-token logits"}

    def reset(self, batch: int, length: int) -> None:
        self.generator = None
        params = self.og.GeneratorParams(self.model)
        most = length + 8
        params.set_search_options(batch_size=batch, max_length=most, min_length=most, do_sample=False)
        self.generator = self.og.Generator(self.model, params)

    def fill(self, prompts: list[list[int]], room: int) -> None:
        self.generator.append_tokens(np.array(prompts, np.int32))
        self.generator.generate_next_token()

    def step(self) -> None:
        self.generator.generate_next_token()

    def prefill(self, prompt: list[int]) -> int:
        self.fill([prompt], 0)
        return int(self.generator.get_next_tokens()[0])


if __name__ == "__main__":
    serve(OrtGenai())
