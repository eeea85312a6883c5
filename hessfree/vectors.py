"""Ordered sets of tensors seen as one flat vector, and back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class FlatSpace:
    """The map between a list of tensors and one flat vector.

    The tensors stand in their order, each row-major. The flat dtype is theirs, promoted to at least
    float32: conjugate gradients lose their conjugacy in half precision long before a network does.

    Attributes:
        shapes: Shape of each tensor.
        dtypes: Dtype of each tensor.
        numels: Number of elements of each tensor.
        size: Number of elements of all tensors.
        dtype: Dtype of the flat vectors.
        device: The one device of all tensors.
    """

    def __init__(self, shapes: Sequence[torch.Size], dtypes: Sequence[torch.dtype], device: torch.device) -> None:
        """Describe tensors of these shapes and dtypes on `device`."""
        self.shapes = list(shapes)
        self.dtypes = list(dtypes)
        self.device = device
        self.numels = [shape.numel() for shape in shapes]
        self.size = sum(self.numels)
        self.dtype = torch.float32
        for dtype in dtypes:
            self.dtype = torch.promote_types(self.dtype, dtype)
        self._uniform = all(dtype == self.dtype for dtype in dtypes)

    def zeros(self) -> Tensor:
        """Return the zero vector, `[size]`."""
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Join the tensors into one vector.

        Args:
            tensors: As many as the space has, each with its number of elements; None stands for zeros.

        Returns:
            A new `[size]` vector without graph, which shares no memory with the tensors.
        """
        pieces = []
        for t, n in zip(tensors, self.numels, strict=True):
            if t is None:
                pieces.append(torch.zeros(n, dtype=self.dtype, device=self.device))
            else:
                flat = t.detach().reshape(-1)
                pieces.append(flat if flat.dtype == self.dtype else flat.to(self.dtype))
        return torch.cat(pieces)  # copies even a single piece

    def views(self, vector: Tensor) -> list[Tensor]:
        """Return `vector` `[size]` as views of the tensors' shapes, in its own dtype."""
        return [piece.view(shape) for piece, shape in zip(vector.split(self.numels), self.shapes, strict=True)]

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return `vector` `[size]` as views of the tensors' shapes (copies where their dtype differs)."""
        views = self.views(vector)
        if self._uniform:
            return views
        return [v.to(dtype) for v, dtype in zip(views, self.dtypes, strict=True)]

    def of_rows(self, rows: slice) -> FlatSpace:
        """Return the space of some rows (indices along dimension 0) of every tensor."""
        shapes = [torch.Size((rows.stop - rows.start, *shape[1:])) for shape in self.shapes]
        return FlatSpace(shapes, self.dtypes, self.device)

    def take_rows(self, vector: Tensor, rows: slice) -> Tensor:
        """Return the numbers of `vector` `[size]` that belong to some rows, as a vector of `of_rows(rows)`."""
        return torch.cat([view[rows].reshape(-1) for view in self.views(vector)])

    def put_rows(self, vector: Tensor, rows: slice, part: Tensor) -> None:
        """Write `part`, a vector of `of_rows(rows)`, into these rows of `vector` `[size]`."""
        for view, piece in zip(self.views(vector), self.of_rows(rows).views(part), strict=True):
            view[rows] = piece


class ParameterVector(FlatSpace):
    """The flat space `[P]` of an ordered set of parameters.

    Parameters that are divided over a mesh of processes (DTensor) have flat vectors all the same, whole and equal on
    every process; `split` gives each process its part of them.

    Attributes:
        params: The parameters, each once.
        divided: Whether some of them are divided over processes.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        """Describe `params`.

        Args:
            params: Floating point tensors on one device; a tensor that stands twice counts once.

        Raises:
            ValueError: No parameter, or parameters that are complex, integer, uninitialised or on
                several devices.
        """
        self.params: tuple[Tensor, ...] = tuple({id(p): p for p in params}.values())
        if not self.params:
            raise ValueError("no parameter that requires grad was given; pass for example model.parameters()")
        for p in self.params:
            _check(p)
        devices = sorted({str(p.device) for p in self.params})
        if len(devices) > 1:
            raise ValueError(
                f"parameters are on several devices ({', '.join(devices)}), but one flat vector lives on one; "
                "move the model to a single device before building the optimizer"
            )
        super().__init__([p.shape for p in self.params], [p.dtype for p in self.params], self.params[0].device)
        self.divided = any(_is_divided(p) for p in self.params)
        self._indices = {id(p): i for i, p in enumerate(self.params)}
        ends = list(itertools.accumulate(self.numels))
        self._slices = [slice(end - n, end) for end, n in zip(ends, self.numels, strict=True)]

    def describes(self, params: Sequence[Tensor]) -> bool:
        """Tell whether these are the parameters, and still of the dtypes, shapes and device they had."""
        kinds = zip(params, self.params, self.dtypes, self.shapes, strict=False)
        return len(params) == len(self.params) and all(
            p is q and p.dtype == dtype and p.shape == shape and p.device == self.device for p, q, dtype, shape in kinds
        )

    def __contains__(self, tensor: object) -> bool:
        """Tell whether `tensor` is one of the parameters (by identity)."""
        return id(tensor) in self._indices

    def index_of(self, param: Tensor) -> int:
        """Return the number of `param` in the order of the parameters."""
        return self._indices[id(param)]

    def slice_of(self, param: Tensor) -> slice:
        """Return where `param` stands in the flat vector."""
        return self._slices[self._indices[id(param)]]

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Join tensors like the parameters into one vector (see `FlatSpace.flatten`)."""
        if self.divided:
            tensors = [_whole(t) if t is not None and _is_divided(t) else t for t in tensors]
        return super().flatten(tensors)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return `vector` `[P]` as tensors like the parameters (see `FlatSpace.split`), divided as they are."""
        pieces = super().split(vector)
        if not self.divided:
            return pieces
        return [_divide(t, p) if _is_divided(p) else t for t, p in zip(pieces, self.params, strict=True)]

    def values(self) -> Tensor:
        """Return a copy of the parameters as one `[P]` vector."""
        return self.flatten(self.params)

    def gradients(self) -> Tensor:
        """Return a copy of every `p.grad` as one `[P]` vector; a missing gradient counts as zero."""
        return self.flatten([p.grad for p in self.params])

    def gradients_like(self, known: Tensor) -> Tensor:
        """Return `gradients()`; `known` `[P]` itself where it holds the same numbers, so that no copy is made."""
        if known.device.type != "cpu":  # one wait for the device, and not one a parameter
            found = self.gradients()
            return known if torch.equal(found, known) else found
        pairs = zip(self.params, self.views(known), strict=True)
        if self._in_one_piece() and all(p.grad is not None and torch.equal(p.grad, t) for p, t in pairs):
            return known
        return self.gradients()

    def backup(self) -> list[Tensor]:
        """Return copies of the parameters, bit for bit, for `restore`; pieces of one vector where it can hold them."""
        return self.views(self.values()) if self._in_one_piece() else [p.detach().clone() for p in self.params]

    def joined(self, backup: Sequence[Tensor]) -> Tensor:
        """Return what `backup` returned as one `[P]` vector, which may be the memory of the backup itself."""
        base = backup[0]._base
        return base if self._in_one_piece() and base is not None else self.flatten(backup)

    def _in_one_piece(self) -> bool:
        """Tell whether a flat vector holds the parameters bit for bit: all of its dtype, and whole on this process."""
        return self._uniform and not any(map(_is_divided, self.params))

    def restore(self, backup: Sequence[Tensor]) -> None:
        """Write back what `backup` returned, unseen by autograd's version counters."""
        for p, b in zip(self.params, backup, strict=True):
            _own(p).data.copy_(_own(b))
        torch.clear_autocast_cache()  # around the whole step, autocast would go on using its copies of the old values

    def try_step(self, backup: Sequence[Tensor], step: Tensor) -> None:
        """Write `backup + step` into the parameters, unseen by autograd's version counters.

        A graph that was kept stays legal, and is right again as soon as `restore` has run. (`p.data`
        carries a version counter of its own, which is why the graph does not notice.)

        Args:
            backup: What `backup` returned.
            step: A `[P]` vector.
        """
        for p, b, s in zip(self.params, backup, self.views(step), strict=True):
            # rounded once, to the parameter's dtype
            _own(p).data.copy_(_own(b) + _own(_divide(s, p) if _is_divided(p) else s))
        torch.clear_autocast_cache()

    def take_step(self, backup: Sequence[Tensor], step: Tensor) -> None:
        """Write `backup + step` into the parameters for good, as any optimizer does.

        Args:
            backup: What `backup` returned.
            step: A `[P]` vector.
        """
        with torch.no_grad():
            for p, b, s in zip(self.params, backup, self.views(step), strict=True):
                _own(p).copy_(_own(b) + _own(_divide(s, p) if _is_divided(p) else s))
        torch.clear_autocast_cache()

    def uniform_or_vector(self, values: Sequence[float]) -> float | Tensor:
        """Turn one number a parameter into the number all share, or else a `[P]` vector.

        Args:
            values: As many numbers as there are parameters.

        Returns:
            A float where all are equal, which keeps `values * vector` one cheap kernel.
        """
        if all(v == values[0] for v in values):
            return values[0]
        pieces = zip(values, self.numels, strict=True)
        return torch.cat([torch.full((n,), v, dtype=self.dtype, device=self.device) for v, n in pieces])


def _is_divided(t: Tensor) -> bool:
    return hasattr(t, "device_mesh") and hasattr(t, "placements")


def _own(t: Tensor) -> Tensor:
    """Return this process's part of `t`, in the same memory."""
    return t.detach().to_local() if _is_divided(t) else t  # type: ignore[attr-defined]


def _whole(t: Any) -> Tensor:
    """Return a divided tensor put together, on every process."""
    return t.detach().full_tensor()


def _divide(t: Tensor, like: Any) -> Tensor:
    """Return `t`, which every process has, divided as `like` is. Nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, like.device_mesh, like.placements, src_data_rank=None)


def _check(p: Tensor) -> None:
    if isinstance(p, torch.nn.parameter.UninitializedParameter):
        raise ValueError(
            "a parameter is uninitialised (a lazy module); run one forward pass before building the optimizer"
        )
    if not p.is_floating_point():
        kind = "complex" if p.is_complex() else "integer"
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} has dtype {p.dtype}, and {kind} parameters have no Gauss-Newton "
            "matrix here; keep it out of the optimizer"
            + (", or store its real view (torch.view_as_real)" if p.is_complex() else "")
        )
