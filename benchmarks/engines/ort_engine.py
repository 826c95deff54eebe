"""ONNX Runtime on the export with past: present values stay in its memory and become the next past."""

from __future__ import annotations

from typing import Any

import numpy as np
from benchmarks.engines.protocol import serve


class Ort:
    def prepare(self, model: str, threads: int, **options: Any) -> dict[str, str]:
        import onnxruntime as ort

        self.ort = ort
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        settings.log_severity_level = 3
        self.session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
        self.past = [i for i in self.session.get_inputs() if i.name.startswith("past")]
        self.outputs = [o.name for o in self.session.get_outputs()]
        return {
            "version": ort.__version__,
            "configuration": "export with past, I/O binding, all graph optimizations, logits of the last "
            "token only; weights, KV float32",
        }

    def _run(self, tokens: np.ndarray, past: list[Any], length: int) -> tuple[np.ndarray, list[Any]]:
        """The next token of each row, and the present values."""
        batch, new = tokens.shape
        positions = np.broadcast_to(np.arange(length, length + new, dtype=np.int64), (batch, new))
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", tokens)
        binding.bind_cpu_input("attention_mask", np.ones((batch, length + new), np.int64))
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
        for info, value in zip(self.past, past):
            binding.bind_ortvalue_input(info.name, value)
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        return logits.numpy()[:, -1].argmax(-1)[:, None].astype(np.int64), present

    def reset(self, batch: int, length: int) -> None:
        self.past_values: list[Any] = []
        self.empty = [
            self.ort.OrtValue.ortvalue_from_numpy(np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32))
            for i in self.past
        ]

    def fill(self, prompts: list[list[int]], room: int) -> None:
        rows = [self._run(np.array([p], np.int64), self.empty, 0) for p in prompts]
        self.tokens = np.concatenate([tokens for tokens, _ in rows])
        values = [present for _, present in rows]
        for layer in range(len(self.past)):
            parts = [present[layer].numpy() for present in values]
            self.past_values.append(self.ort.OrtValue.ortvalue_from_numpy(np.concatenate(parts)))
        self.length = len(prompts[0])

    def step(self) -> None:
        self.tokens, self.past_values = self._run(self.tokens, self.past_values, self.length)
        self.length += 1

    def prefill(self, prompt: list[int]) -> int:
        tokens, self.past_values = self._run(np.array([prompt], np.int64), self.empty, 0)
        return int(tokens[0, 0])


if __name__ == "__main__":
    serve(Ort())
