"""The ONNX file itself, run by ONNX Runtime: what compiled models are compared with."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from kvc_passes.errors import InputError

from .frontend.encoders import output_of
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
        self.session = _session(path, file.model)
        if not is_exact(file.model):
            self.types |= {n: np.dtype(np.float32) for n in self.types if self.types[n].kind in "fV"}
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


class EncoderReference:
    """The output of an encoder's ONNX file; computed in float32. Raises as Reference does."""

    def __init__(self, path: Path, output: str | None = None) -> None:
        file = read(path)
        self.session = _session(path, file.model)
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.output = output_of(file.graph, path, output).name

    def rows(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """float32 [rows, width] of one request's inputs."""
        result: np.ndarray = self.session.run([self.output], {name: inputs[name] for name in self.inputs})[0][
            0
        ]
        return result


def _session(path: Path, model: onnx.ModelProto) -> Any:
    """ONNX Runtime's session of a file, in float32. Raises InputError where it cannot be had."""
    try:
        import onnxruntime
    except ImportError:
        raise InputError("comparing needs ONNX Runtime; install it with: pip install 'kvc[verify]'") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float32
    with tempfile.TemporaryDirectory() as folder:
        exact = path if is_exact(model) else widen(path, Path(folder) / path.name)
        try:
            return onnxruntime.InferenceSession(str(exact), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: ONNX Runtime cannot load it: {reason}") from None
