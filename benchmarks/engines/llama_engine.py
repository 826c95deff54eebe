"""llama.cpp through llama-cpp-python's C bindings, on a GGUF file."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import numpy as np
from benchmarks.engines.protocol import serve

_GGML_F32, _GGML_F16 = 0, 1


class Llama:
    def prepare(self, model: str, threads: int, **options: Any) -> dict[str, str]:
        import llama_cpp

        self.api = llama_cpp
        self.threads = threads
        self.kv = str(options.get("kv", "f32"))
        self.cells, self.sequences = int(options.get("cells", 0)), int(options.get("sequences", 0))
        self.log: list[str] = []
        self.listens = llama_cpp.llama_log_callback(
            lambda level, text, data: self.log.append(text.decode(errors="replace"))
        )
        llama_cpp.llama_log_set(self.listens, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            model.encode(), llama_cpp.llama_model_default_params()
        )
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.context: Any = None
        self.batch: Any = None
        self.size = (0, 0)
        return {
            "version": llama_cpp.__version__,
            "configuration": f"GGUF {options.get('weights', 'float32')}, KV {self.kv}, flash attention auto, "
            "batch 2048, micro-batch 512" + (f", n_ctx {self.cells} for all sequences" if self.cells else ""),
        }

    def reset(self, batch: int, length: int) -> None:
        api = self.api
        size = batch * -(-length // 256) * 256
        if self.cells:  # one context for whatever comes
            batch, size = self.sequences, self.cells
        if self.context is not None:
            if self.size == (batch, size):
                api.llama_memory_clear(api.llama_get_memory(self.context), False)
                return
            api.llama_batch_free(self.batch)
            api.llama_free(self.context)
        self.size = (batch, size)
        params = api.llama_context_default_params()
        params.n_seq_max = batch
        params.n_ctx = size
        params.n_batch, params.n_ubatch = 2048, 512
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k = params.type_v = _GGML_F32 if self.kv == "f32" else _GGML_F16
        params.kv_unified, params.swa_full = bool(self.cells), not self.cells
        params.no_perf = True
        self.log.clear()
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp made no context")
        self.batch = api.llama_batch_init(2048, 0, 1)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Compute (token, position, sequence, whether its logits are wanted)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = wanted
        if self.api.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")

    def _likeliest(self, index: int) -> int:
        logits = self.api.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def _prompt(self, prompt: list[int], sequence: int) -> int:
        last = len(prompt) - 1
        for start in range(0, len(prompt), 2048):
            part = prompt[start : start + 2048]
            self._decode([(t, start + i, sequence, start + i == last) for i, t in enumerate(part)])
        return self._likeliest(-1)

    def fill(self, prompts: list[list[int]], room: int) -> None:
        self.tokens = [self._prompt(prompt, index) for index, prompt in enumerate(prompts)]
        self.length = len(prompts[0])

    def step(self) -> None:
        self._decode([(token, self.length, s, True) for s, token in enumerate(self.tokens)])
        self.tokens = [self._likeliest(index) for index in range(len(self.tokens))]
        self.length += 1

    def prefill(self, prompt: list[int]) -> int:
        return self._prompt(prompt, 0)

    def generate(self, prompts: list[list[int]], new: int) -> None:
        self.reset(len(prompts), len(prompts[0]) + new)
        self.fill(prompts, new)
        for _ in range(new - 1):
            self.step()

    def kv_bytes(self) -> int:
        found = re.findall(r"KV buffer size = +([0-9.]+) MiB", "".join(self.log))
        return round(sum(float(size) for size in found) * 2**20)


if __name__ == "__main__":
    serve(Llama())
