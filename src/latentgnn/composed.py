"""The layer as PyTorch operations over all nodes, for norms that need statistics and for exported programs.

Against `latentgnn.reference`, with the same result:

1. One product for W_v and W_l, one for all kernels' Psi^v, one for all kernels' Psi^l.
2. The assignment's norm over nodes divides the latents, not the assignment.
3. U, or with graph convolution G, is applied to the latents: a product over D nodes instead of N.
4. A norm that is an affine map is folded, with gamma, into the matrix before it; the residual is added in the product.
5. A training batch norm of the output takes its statistics from the factors (`latentgnn.norms.product_statistics`).

With batch norm in training, the input and what each norm inside is applied to are held for the backward pass; all else
is recomputed there. With group or layer norm it is the input alone.

Axes: B batch, N nodes, C channels, R reduced channels, G groups, r = R / G, D latents of one kernel, F features,
S samples (B, or the scenes of packed nodes), E = S * G graphs. Tensors over nodes are (B, N, channels) whatever their
strides: a contiguous (B, C, N) is a transposed view of it, and no input is copied.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentgnn.functional import gather, l2, mix, node_weight, reciprocal, wide
from latentgnn.norms import (
    Moments,
    batch_affine,
    batch_statistics,
    fold,
    is_repeatable,
    moments,
    normalize,
    product_statistics,
    uses_batch_statistics,
)
from latentgnn.tiles import convolves

if TYPE_CHECKING:
    from latentgnn.layers import LatentGNN, Projection


@dataclass(frozen=True)
class Nodes:
    """Which nodes take part, and which sample each belongs to.

    Args:
        mask_BN: nodes that take part; ``None`` for all.
        offsets: where each sample begins among the nodes of a single row, and the end; ``None`` if rows are samples.
    """

    mask_BN: Tensor | None = None
    offsets: Sequence[int] | None = None

    def split(self, x_BNF: Tensor) -> list[Tensor]:
        """Parts whose rows are samples: all at once, or one for each scene."""
        if self.offsets is None:
            return [x_BNF]
        return [x_BNF[:, first:last] for first, last in pairwise(self.offsets)]

    def split_samples(self, matrix_E: Tensor) -> list[Tensor]:
        """A tensor over samples or graphs, cut to go with the parts of `split`."""
        return [matrix_E] if self.offsets is None else list(matrix_E.chunk(len(self.offsets) - 1))

    def product(self, x_ENF: Tensor, matrix_EFO: Tensor) -> Tensor:
        """x @ matrix, with a matrix for each sample or graph."""
        parts = zip(self.split(x_ENF), self.split_samples(matrix_EFO), strict=True)
        return _joined([torch.bmm(part, matrix) for part, matrix in parts], 1)


class Held(NamedTuple):
    """Channels as they are before a norm, (B, N, F), and the norm; what comes after it need not be kept."""

    before: Tensor
    norm: Callable[[Tensor], Tensor]

    def after(self) -> Tensor:
        """The channels after the norm."""
        return self.norm(self.before)


def latent_gnn(layer: "LatentGNN", x_BNC: Tensor, nodes: Nodes, compute: torch.dtype) -> Tensor:
    """The layer's output for nodes in the last dimension but one.

    Args:
        layer: the parameters.
        x_BNC: input; a transposed view is as good as a contiguous tensor.
        nodes: which take part; the others come back unchanged.
        compute: type of the products over nodes; what is summed over nodes and every norm is at least float32.

    Returns:
        (B, N, C) in the input's type and order of strides.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return _Composition(layer, nodes, compute, _at_once)(x_BNC)
    if all(is_repeatable(norm) for norm in layer.norms):
        return _recomputed(_Composition(layer, nodes, compute, _at_once), x_BNC)
    return _Composition(layer, nodes, compute, _recomputed)(x_BNC)


def _at_once(stage: Callable[..., Any], *arguments: Any) -> Any:
    return stage(*arguments)


def _recomputed(stage: Callable[..., Any], *arguments: Any) -> Any:
    """Run a stage that keeps only its arguments for the backward pass and is run again there."""
    return checkpoint(stage, *arguments, use_reentrant=False, preserve_rng_state=False, determinism_check="none")


class _Composition:
    """The layer's steps, with what all of them need to know.

    Args:
        layer: the parameters.
        nodes: which take part.
        compute: type of the products over nodes.
        run: calls a stage with its arguments; it may recompute it in the backward pass.
    """

    def __init__(self, layer: "LatentGNN", nodes: Nodes, compute: torch.dtype, run: Callable[..., Any]) -> None:
        self.layer, self.nodes, self.compute, self.run = layer, nodes, compute, run
        self.config, self.groups = layer.config, layer.config.num_groups

    def __call__(self, x_BNC: Tensor) -> Tensor:
        layer, kernels, mask_BN = self.layer, self.layer.kernel_list, self.nodes.mask_BN
        original_BNC = x_BNC
        if mask_BN is not None:
            x_BNC = x_BNC.masked_fill(~mask_BN.unsqueeze(-1), 0)
        reduces = [part for part in (layer.gather_reduce, layer.scatter_reduce) if part is not None]
        x_BNC, values = self.reduced(x_BNC, reduces)
        gathers = self.assigned(values[0], [kernel.gather_assign for kernel in kernels])
        scatters = gathers
        if not self.config.symmetric:
            assigns = [kernel.scatter_assign for kernel in kernels if kernel.scatter_assign is not None]
            scatters = self.assigned(values[-1], assigns)
        latents = [mix(latent) for latent in self.run(self.gathered, values[0], gathers)]
        if self.config.graph_conv:
            convs = [kernel.graph_conv for kernel in kernels if kernel.graph_conv is not None]
            features = self.convolved(scatters, latents, convs)
            matrix_SFC = layer.expand.weight.to(wide(self.compute)).mT[None]
            out_BNC = self.expanded(x_BNC, lambda: self.rectified(features), matrix_SFC)
        else:
            matrix_SFC = self.expanded_latents(latents)
            out_BNC = self.expanded(x_BNC, lambda: self.unit_assignments(scatters), matrix_SFC)
        return out_BNC if mask_BN is None else torch.where(mask_BN.unsqueeze(-1), out_BNC, original_BNC)

    def held(self, norm: nn.Module, before_BNF: Tensor) -> Held:
        """Channels and the norm to apply; batch statistics and what a module remembers are taken once, here."""
        if uses_batch_statistics(norm):
            scale_F, shift_F = batch_affine(norm, *batch_statistics(before_BNF, self.nodes.mask_BN))
            return Held(before_BNF, lambda x: torch.addcmul(shift_F, x.to(shift_F.dtype), scale_F))

        def normalized(x_BNF: Tensor) -> Tensor:
            parts = [part for part in self.nodes.split(x_BNF) if part.shape[1] > 0]
            return _joined([normalize(norm, part, self.nodes.mask_BN) for part in parts], 1)

        return Held(before_BNF, normalized) if is_repeatable(norm) else Held(normalized(before_BNF), _same)

    def reduced(self, x_BNC: Tensor, reduces: Sequence["Projection"]) -> tuple[Tensor, list[Held]]:
        """W x of gather and of scatter; before them x, for all that follows (`_Reduction`)."""
        norms = [reduce.norm for reduce in reduces]
        weight_FC = torch.cat([reduce.weight for reduce in reduces]).to(wide(self.compute))
        folded = fold(norms, weight_FC)
        weight_FC, shift_F = (weight_FC, None) if folded is None else folded
        scale = None
        if self.compute == torch.float16:
            # Rows longer than 1 may take a sum over channels out of float16's range.
            scale = torch.linalg.vector_norm(weight_FC.detach().float(), dim=1).amax().clamp_min(1)
            weight_FC, shift_F = weight_FC / scale, None if shift_F is None else shift_F / scale
        one_type = x_BNC.dtype == self.compute
        if x_BNC.requires_grad and shift_F is None and one_type and not torch.compiler.is_exporting():
            x_BNC, product_BNF = _Reduction.apply(x_BNC, weight_FC.to(self.compute))
        else:
            product_BNF = _product(x_BNC.to(self.compute), weight_FC, shift_F)
        parts = product_BNF.chunk(len(reduces), dim=-1)
        if folded is not None:
            # Unit length comes next, whatever the scale.
            return x_BNC, [Held(part, _same) for part in parts]
        if scale is not None:
            parts = tuple(part.float() * scale for part in parts)
        return x_BNC, [self.held(norm, part) for norm, part in zip(norms, parts, strict=True)]

    def unit_values(self, value: Held) -> Tensor:
        """V or L: l2 over the channels of a group, (E, N, r)."""
        value_BNGr = value.after().unflatten(-1, (self.groups, -1))
        return _to_graphs(l2(value_BNGr, -1).to(self.compute), self.groups)

    def assigned(self, value: Held, assigns: Sequence["Projection"]) -> list[Held]:
        """Psi V of every kernel."""
        folds = [fold([assign.norm], assign.weight.to(wide(self.compute))) for assign in assigns]
        weights_GDr = [
            (assign.weight if pair is None else pair[0]).unflatten(0, (self.groups, -1))
            for assign, pair in zip(assigns, folds, strict=True)
        ]
        shifts_GD = [
            weight_GDr.new_zeros(weight_GDr.shape[:2])
            if pair is None or pair[1] is None
            else pair[1].view(self.groups, -1)
            for weight_GDr, pair in zip(weights_GDr, folds, strict=True)
        ]
        weight_GDr, shift_GD = _joined(weights_GDr, 1), _joined(shifts_GD, 1)

        def products(value: Held) -> Tensor:
            return _grouped_product(self.unit_values(value), weight_GDr, shift_GD)

        parts_END = self.run(products, value).split(list(self.config.latents), dim=-1)
        parts_BND = [_to_nodes(part, self.groups) for part in parts_END]
        return [
            self.held(assign.norm, part) if pair is None else Held(part, _same)
            for assign, pair, part in zip(assigns, folds, parts_BND, strict=True)
        ]

    def assignments(self, assigned: Sequence[Held]) -> list[Tensor]:
        """P of every kernel before its normalisation, (E, N, D)."""
        rectified = [torch.relu(one.after()).to(self.compute) for one in assigned]
        return [_to_graphs(one.unflatten(-1, (self.groups, -1)), self.groups) for one in rectified]

    def unit_assignments(self, assigned: Sequence[Held]) -> Tensor:
        """Q of all kernels, l2 over latents: (B, N, K * G * D)."""
        return _joined([_to_nodes(l2(one, -1), self.groups) for one in self.assignments(assigned)], -1)

    def gathered(self, value: Held, assigned: Sequence[Held]) -> list[Tensor]:
        """Z of every kernel, divided by what its nodes weigh: (E, D, r)."""
        value_ENr = self.unit_values(value)
        latents = []
        for assign_END in self.assignments(assigned):
            if self.config.symmetric:
                assign_END = l2(assign_END, -1)
            if self.nodes.mask_BN is not None:
                assign_END = assign_END * _to_graphs(self.nodes.mask_BN[:, :, None, None], self.groups)
            parts = self.nodes.split(assign_END)
            pairs = zip(self.nodes.split(value_ENr), parts, strict=True)
            latent_EDr = _joined([gather(*pair) for pair in pairs], 0)
            if not self.config.symmetric or self.config.node_scale == "mean":
                weight_ED1 = _joined([node_weight(part, node_scale=self.config.node_scale) for part in parts], 0)
                latent_EDr = latent_EDr * reciprocal(weight_ED1)
            latents.append(latent_EDr)
        return latents

    def convolved(
        self, assigned: Sequence[Held], latents: Sequence[Tensor], convs: Sequence["Projection"]
    ) -> list[Held]:
        """G O of every kernel with G moved onto the latents, (B, N, R)."""
        matrices, shifts, folds = [], [], []
        for latent_EDr, conv in zip(latents, convs, strict=True):
            folded = fold([conv.norm], conv.weight.to(latent_EDr.dtype))
            weight_RR, shift_R = (conv.weight.to(latent_EDr.dtype), None) if folded is None else folded
            weight_Grr = weight_RR.unflatten(0, (self.groups, -1))
            matrix_SGDr = latent_EDr.unflatten(0, (-1, self.groups)) @ weight_Grr.mT
            matrices.append(matrix_SGDr.flatten(0, 1).to(self.compute))
            shifts.append(shift_R)
            folds.append(folded is not None)

        def products(assigned: Sequence[Held]) -> list[Tensor]:
            outs = []
            for assign_END, matrix_EDr, shift_R in zip(self.assignments(assigned), matrices, shifts, strict=True):
                out_BNR = _to_nodes(self.nodes.product(l2(assign_END, -1), matrix_EDr), self.groups)
                outs.append(out_BNR if shift_R is None else out_BNR + shift_R.to(out_BNR.dtype))
            return outs

        outs = self.run(products, assigned)
        return [
            Held(out, _same) if folded else self.held(conv.norm, out)
            for conv, out, folded in zip(convs, outs, folds, strict=True)
        ]

    def rectified(self, features: Sequence[Held]) -> Tensor:
        """relu(norm(G O)) of all kernels, (B, N, K * R)."""
        return _joined([torch.relu(one.after()).to(self.compute) for one in features], -1)

    def expanded_latents(self, latents: Sequence[Tensor]) -> Tensor:
        """U moved onto the latents, H = Y U^T: (S, K * G * D, C)."""
        weight_CF = self.layer.expand.weight.to(latents[0].dtype)
        matrices = []
        for latent_EDr, weight_CR in zip(latents, weight_CF.chunk(len(latents), dim=1), strict=True):
            weight_GrC = weight_CR.unflatten(1, (self.groups, -1)).permute(1, 2, 0)
            matrices.append((latent_EDr.unflatten(0, (-1, self.groups)) @ weight_GrC).flatten(1, 2))
        return _joined(matrices, 1)

    def expanded(self, x_BNC: Tensor, feature: Callable[[], Tensor], matrix_SFC: Tensor) -> Tensor:
        """x + gamma * norm(feature @ matrix), or norm(feature @ matrix) without residual, with the strides of x."""
        norm = self.layer.expand.norm
        gamma = self.layer.gamma if self.config.residual else None
        folded = fold([norm], matrix_SFC.flatten(0, 1).mT)
        if folded is not None:
            scaled_SFC, shift_C = folded[0].mT.unflatten(0, matrix_SFC.shape[:2]), folded[1]
        elif uses_batch_statistics(norm):
            of_features = Moments(*self.run(lambda: self.moments(feature(), shared=matrix_SFC.shape[0] == 1)))
            mean_C, var_C, count = product_statistics(of_features, matrix_SFC)
            # Without a mask the number of nodes is known, and nobody need wait for it.
            known = x_BNC.shape[0] * x_BNC.shape[1]
            scale_C, shift_C = batch_affine(norm, mean_C, var_C, known if self.nodes.mask_BN is None else count)
            scaled_SFC = matrix_SFC * scale_C
        else:
            run = self.run if is_repeatable(norm) else _at_once
            return run(lambda: self.normalized(x_BNC, feature(), matrix_SFC))
        if gamma is not None:
            scaled_SFC, shift_C = scaled_SFC * gamma, None if shift_C is None else shift_C * gamma
        return self.run(lambda: self.added(x_BNC, feature(), scaled_SFC, shift_C))

    def moments(self, feature_BNF: Tensor, *, shared: bool) -> Moments:
        """Moments of every sample's features; with one matrix for all samples, their nodes are nodes of one sample."""
        mask_BN = self.nodes.mask_BN
        if shared:
            return moments(feature_BNF.flatten(0, 1)[None], None if mask_BN is None else mask_BN.flatten()[None])
        parts = [moments(part, mask_BN) for part in self.nodes.split(feature_BNF)]
        return Moments(*(_joined(parts_S, 0) for parts_S in zip(*parts, strict=True)))

    def normalized(self, x_BNC: Tensor, feature_BNF: Tensor, matrix_SFC: Tensor) -> Tensor:
        """The output where the norm needs the product itself."""
        y_BNC = self.held(self.layer.expand.norm, self.product(feature_BNF, matrix_SFC)).after()
        return (x_BNC + self.layer.gamma * y_BNC if self.config.residual else y_BNC).to(x_BNC.dtype)

    def product(self, feature_BNF: Tensor, matrix_SFC: Tensor) -> Tensor:
        """feature @ matrix, where one matrix may be everybody's."""
        matrix_SFC = matrix_SFC.to(feature_BNF.dtype)
        if matrix_SFC.shape[0] == 1:
            return _product(feature_BNF, matrix_SFC[0].mT, None)
        return self.nodes.product(feature_BNF, matrix_SFC)

    def added(self, x_BNC: Tensor, feature_BNF: Tensor, matrix_SFC: Tensor, shift_C: Tensor | None) -> Tensor:
        """x + feature @ matrix + shift, with the strides of x; without residual, the same without x."""
        base_BNC = x_BNC if self.config.residual else None
        shift_C = None if shift_C is None else shift_C.to(x_BNC.dtype)
        if self.nodes.offsets is not None:
            out_BNC = self.product(feature_BNF, matrix_SFC).to(x_BNC.dtype)
            out_BNC = out_BNC if shift_C is None else out_BNC + shift_C
            return out_BNC if base_BNC is None else out_BNC + base_BNC
        matrix_BFC = matrix_SFC.to(feature_BNF.dtype).expand(feature_BNF.shape[0], -1, -1)
        if x_BNC.stride(-1) == 1:
            return _add_product(base_BNC, feature_BNF, matrix_BFC, shift_C, x_BNC.dtype)
        if base_BNC is not None and convolves(matrix_SFC, x_BNC) and feature_BNF.dtype == x_BNC.dtype:
            return _add_convolution(base_BNC, feature_BNF, matrix_SFC[0].to(x_BNC.dtype), shift_C)
        shift_C1 = None if shift_C is None else shift_C[:, None]
        base_BCN = None if base_BNC is None else base_BNC.mT
        return _add_product(base_BCN, matrix_BFC.mT, feature_BNF.mT, shift_C1, x_BNC.dtype).mT


class _Reduction(torch.autograd.Function):
    """x as it is, and x W^T.

    The gradients of both meet in one product, which has the strides of x; autograd would add them in another pass.
    """

    @staticmethod
    def forward(ctx: Any, x_BNC: Tensor, weight_FC: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_BNC, weight_FC)
        return x_BNC.view_as(x_BNC), _product(x_BNC, weight_FC, None)

    @staticmethod
    def backward(ctx: Any, grad_BNC: Tensor, grad_BNF: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_BNC, weight_FC = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        grad_x_BNC = grad_weight_FC = None
        if needs_weight:
            grad_weight_FC = torch.bmm(grad_BNF.mT, x_BNC).sum(0)
        if needs_x:
            weight_BFC = weight_FC.expand(x_BNC.shape[0], -1, -1)
            if convolves(weight_BFC, x_BNC):
                grad_x_BNC = _add_convolution(grad_BNC, grad_BNF, weight_FC, None)
            elif x_BNC.stride(-1) == 1:
                grad_x_BNC = torch.baddbmm(grad_BNC, grad_BNF, weight_BFC)
            else:
                grad_x_BNC = torch.baddbmm(grad_BNC.mT, weight_BFC.mT, grad_BNF.mT).mT
        return grad_x_BNC, grad_weight_FC


def _same(x: Tensor) -> Tensor:
    return x


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _to_graphs(x_BNGr: Tensor, groups: int) -> Tensor:
    """(B, N, G or 1, r) to (B * G, N, r): a group is one more graph in the batch."""
    return x_BNGr.transpose(1, 2).expand(-1, groups, -1, -1).flatten(0, 1)


def _to_nodes(x_ENr: Tensor, groups: int) -> Tensor:
    """(B * G, N, r) to (B, N, G * r)."""
    return x_ENr.unflatten(0, (-1, groups)).transpose(1, 2).flatten(2)


def _product(x_BNF: Tensor, weight_OF: Tensor, shift_O: Tensor | None) -> Tensor:
    """x W^T + shift without a copy of x; the result is contiguous."""
    weight_OF = weight_OF.to(x_BNF.dtype)
    shift_O = None if shift_O is None else shift_O.to(x_BNF.dtype)
    if x_BNF.stride(-1) == 1:
        rows = x_BNF.reshape(-1, x_BNF.shape[-1])
        y = rows @ weight_OF.mT if shift_O is None else torch.addmm(shift_O, rows, weight_OF.mT)
        return y.unflatten(0, x_BNF.shape[:2])
    # A batched product takes each sample's transposed matrix as it lies; a plain one would first copy them together.
    weight_BFO = weight_OF.mT.expand(x_BNF.shape[0], -1, -1)
    return torch.bmm(x_BNF, weight_BFO) if shift_O is None else torch.baddbmm(shift_O, x_BNF, weight_BFO)


def _grouped_product(x_ENF: Tensor, weight_GOF: Tensor, shift_GO: Tensor) -> Tensor:
    """x W_g^T + shift_g for the graphs of group g, (E, N, O)."""
    groups = weight_GOF.shape[0]
    if groups == 1:
        return _product(x_ENF, weight_GOF[0], shift_GO[0])
    batch = x_ENF.shape[0] // groups
    weight_EFO = weight_GOF.mT.to(x_ENF.dtype).repeat(batch, 1, 1)
    return torch.baddbmm(shift_GO.to(x_ENF.dtype).repeat(batch, 1)[:, None], x_ENF, weight_EFO)


def _add_convolution(x_BNC: Tensor, left_BNF: Tensor, right_FC: Tensor, shift_C: Tensor | None) -> Tensor:
    """x + shift + left @ right where `latentgnn.tiles.convolves` says so."""
    return torch.conv1d(left_BNF.mT, right_FC.mT.unsqueeze(-1), shift_C).add_(x_BNC.mT).mT


def _add_product(x: Tensor | None, left: Tensor, right: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x + shift + left @ right in one pass over the result."""
    if left.dtype != dtype:
        y = torch.bmm(left, right).to(dtype)
        y = y if shift is None else y + shift
        return y if x is None else y + x
    if x is None:
        return torch.bmm(left, right) if shift is None else torch.baddbmm(shift, left, right)
    if shift is None:
        return torch.baddbmm(x, left, right)
    if torch.is_grad_enabled():
        # The shift comes last: a recomputation stops at the product, the last operation that holds anything.
        return torch.baddbmm(x, left, right).add_(shift)
    # `baddbmm` starts from a copy of x; adding the shift takes that copy's place.
    return (x + shift).baddbmm_(left, right)
