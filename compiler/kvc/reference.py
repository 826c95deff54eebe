"""The ONNX file itself, run by ONNX Runtime: what compiled models are compared with."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx

from kvc_passes.errors import InputError

from .frontend.reader import read
from .frontend.roles import find_roles
from .widen import is_exact, widen


class Reference:
    """Logits of whole sequences, batch 1, nothing cached; computed in float32, whatever the graph stores.

    Args:
        path: the ONNX file.
        head_dim: elements of a head, for files that do not say it in the shape of their past.

    Raises:
        InputError: the file cannot be run, or ONNX Runtime is not installed.
    """

    def __init__(self, path: Path, head_dim: int = 0) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise InputError(
                "comparing needs ONNX Runtime; install it with: pip install 'kvc[verify]'"
            ) from None
        file = read(path)
        self.roles = find_roles(file.graph, path)
        self.types = {
            value.name: onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            for value in file.graph.input
        }
        self.head_dim = head_dim
        self.shapes = {
            value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in file.graph.input
        }
        with tempfile.TemporaryDirectory() as folder:
            exact = path
            if not is_exact(file.model):
                exact = widen(path, Path(folder) / path.name)
                floats = {name: np.dtype(np.float32) for name in self.types if self.types[name].kind in "fV"}
                self.types |= floats
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float32
            try:
                self.session = onnxruntime.InferenceSession(
                    str(exact), options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # its exceptions have no common base
                reason = str(error).splitlines()[0]
                raise InputError(f"{path}: ONNX Runtime cannot load it: {reason}") from None
        output = self.session.get_outputs()[0]
        self.output = output.name
        self.columns = output.shape[-1] if output.shape and isinstance(output.shape[-1], int) else None
        """Columns of the logits, None if the file does not say."""

    def logits(self, tokens: np.ndarray, memory: np.ndarray | None = None) -> np.ndarray:
        """float32 [length, V] for token ids [length], and an encoder's output [rows, d]."""
        length = len(tokens)
        feeds = {self.roles.tokens: tokens[None].astype(self.types[self.roles.tokens])}
        if self.roles.attention_mask:
            name = self.roles.attention_mask
            feeds[name] = np.ones((1, length), self.types[name])
        if self.roles.memory and memory is not None:
            feeds[self.roles.memory] = memory[None].astype(self.types[self.roles.memory])
            if self.roles.memory_mask is not None:
                name = self.roles.memory_mask
                feeds[name] = np.ones((1, len(memory)), self.types[name])
        if self.roles.positions:
            name = self.roles.positions
            feeds[name] = np.arange(length)[None].astype(self.types[name])
        for name in self.roles.past:
            _, heads, _, size = self.shapes[name]
            feeds[name] = np.zeros((1, heads, 0, size or self.head_dim), self.types[name])
        result: np.ndarray = self.session.run([self.output], feeds)[0][0]
        return result
