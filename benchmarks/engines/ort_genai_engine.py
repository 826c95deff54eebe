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
        self.layers = config["model"]["decoder"]["num_hidden_layers"]
        self.chunk = int(options.get("chunk", 0))
        self.generator: Any = None
        said = f", prompts in chunks of {self.chunk} where there is one" if self.chunk else ""
        return {
            "version": og.__version__,
            "configuration": f"float32 model of its builder, last-token logits{said}",
        }

    def reset(self, batch: int, length: int) -> None:
        self._start(batch, length + 8)

    def _start(self, batch: int, most: int) -> None:
        self.generator = None
        params = self.og.GeneratorParams(self.model)
        params.set_search_options(batch_size=batch, max_length=most, min_length=most, do_sample=False)
        if self.chunk and batch == 1:  # it refuses chunks of several prompts
            params.set_search_options(chunk_size=self.chunk)
        self.generator = self.og.Generator(self.model, params)

    def fill(self, prompts: list[list[int]], room: int) -> None:
        self.generator.append_tokens(np.array(prompts, np.int32))
        self.generator.generate_next_token()

    def step(self) -> None:
        self.generator.generate_next_token()

    def prefill(self, prompt: list[int]) -> int:
        self.fill([prompt], 0)
        return int(self.generator.get_next_tokens()[0])

    def generate(self, prompts: list[list[int]], new: int) -> None:
        self._start(len(prompts), len(prompts[0]) + new)
        self.generator.append_tokens(np.array(prompts, np.int32))
        for _ in range(new):
            self.generator.generate_next_token()

    def kv_bytes(self) -> int:
        names = [f"past_key_values.{i}.{kind}" for i in range(self.layers) for kind in ("key", "value")]
        return sum(self.generator.get_input(name).nbytes for name in names)


if __name__ == "__main__":
    serve(OrtGenai())
