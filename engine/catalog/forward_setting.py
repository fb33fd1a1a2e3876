"""Forward settings: backend, precision and batch size; imports no torch."""

from dataclasses import dataclass
from typing import Literal

Backend = Literal["eager", "openvino", "captured", "compiled", "graphed"]
"""`captured`: eager PyTorch as one CUDA graph; `graphed`: compiled, as one CUDA graph."""
Precision = Literal["float32", "float16", "bfloat16"]

MAX_BATCH_SIZE = 4096
"""Most inputs per pass."""


@dataclass(frozen=True)
class ForwardSetting:
    """Backend, precision and batch size of a model's forward pass."""

    backend: Backend = "eager"
    precision: Precision = "float32"
    """Of weights and activations; logits and softmax are never less than float32."""
    batch_size: int = 4
    """Inputs per pass. Memory grows with it; scores move by rounding alone."""
    is_autocast: bool = False
    """A half precision by `torch.autocast`: weights, and the operations that need it, stay float32."""

    def __str__(self) -> str:
        return f"{self.protocol}, {self.batch_size} per pass"

    @property
    def protocol(self) -> str:
        """Backend and precision: values of different ones are never in one column."""
        return f"{self.backend} {self.precision}{' autocast' if self.is_autocast else ''}"
