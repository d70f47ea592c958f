"""The layer's forward pass, rearranged so that as little as possible is done once a node.

Against `latentgnn.reference`, with the same result:

1. One product for W_v and W_l, one for all kernels' Psi^v, one for all kernels' Psi^l.
2. The assignment's norm over nodes divides the latents, not the assignment.
3. U, or with graph convolution G, is applied to the latents: a product over D nodes instead of N.
4. A norm that is an affine map is folded, with gamma, into the matrix before it; the residual is added in the product.
5. A training batch norm of a product takes its statistics from the factors (`latentgnn.norms.product_statistics`).

Axes: B batch, N nodes, C channels, R reduced channels, G groups, r = R / G, D latents of all kernels, F features,
E = B * G graphs. Tensors over nodes are (B, N, channels) whatever their strides: a contiguous (B, C, N) is a
transposed view of it, and no input is copied.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from latentgnn.functional import gather, l2, mix, node_weight, reciprocal, wide
from latentgnn.norms import affine, batch_affine, fold, normalize, product_statistics, uses_batch_statistics

if TYPE_CHECKING:
    from latentgnn.layers import LatentGNN, Projection


def latent_gnn(layer: "LatentGNN", x_BNC: Tensor, mask_BN: Tensor | None, compute: torch.dtype) -> Tensor:
    """The layer's output for nodes in the last dimension but one.

    Args:
        layer: the parameters.
        x_BNC: input; a transposed view is as good as a contiguous tensor.
        mask_BN: nodes that take part; the others come back unchanged.
        compute: type of the products over nodes; what is summed over nodes and every norm is at least float32.

    Returns:
        (B, N, C) in the input's type and order of strides.
    """
    config = layer.config
    kernels = layer.kernel_list
    original_BNC = x_BNC
    if mask_BN is not None:
        x_BNC = x_BNC.masked_fill(~mask_BN.unsqueeze(-1), 0)

    reduces = [layer.gather_reduce, layer.scatter_reduce]
    values = _unit_values(x_BNC.to(compute), [part for part in reduces if part is not None], config.num_groups, mask_BN)
    value_ENr = values[0]
    valid_EN1 = None if mask_BN is None else _to_graphs(mask_BN[:, :, None, None], config.num_groups)

    assign_END = _assign(value_ENr, [kernel.gather_assign for kernel in kernels], mask_BN, config.num_groups)
    if config.symmetric:
        assign_END = scatter_END = _unit_latents(assign_END, config.latents)
    else:
        scatters = [kernel.scatter_assign for kernel in kernels if kernel.scatter_assign is not None]
        scatter_END = _unit_latents(_assign(values[1], scatters, mask_BN, config.num_groups), config.latents)
    if valid_EN1 is not None:
        assign_END = assign_END * valid_EN1

    latent_EDr = gather(value_ENr, assign_END)
    if not config.symmetric or config.node_scale == "mean":
        latent_EDr = latent_EDr * reciprocal(node_weight(assign_END, node_scale=config.node_scale))
    mixed = [mix(latent) for latent in latent_EDr.split(config.latents, dim=1)]
    scatters_END = scatter_END.split(config.latents, dim=-1)

    expand_wide = layer.expand.weight.to(wide(compute))
    if config.graph_conv:
        convolved = [
            _graph_conv(scatter, latent, kernel.graph_conv, mask_BN, config.num_groups)
            for scatter, latent, kernel in zip(scatters_END, mixed, kernels, strict=True)
            if kernel.graph_conv is not None
        ]
        feature_BNF, matrix_BFC = torch.cat(convolved, -1) if len(convolved) > 1 else convolved[0], expand_wide.mT[None]
    else:
        feature_BNF, matrix_BFC = _expand_latents(scatters_END, mixed, expand_wide, config.num_groups)
    gamma = layer.gamma if config.residual else None
    out_BNC = _residual(x_BNC, feature_BNF, matrix_BFC, layer.expand.norm, gamma, mask_BN)
    return out_BNC if mask_BN is None else torch.where(mask_BN.unsqueeze(-1), out_BNC, original_BNC)


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


def _unit_values(x_BNC: Tensor, reduces: Sequence["Projection"], groups: int, mask_BN: Tensor | None) -> list[Tensor]:
    """V and L: l2(norm(W x), channels of a group), each (E, N, r)."""
    norms = [reduce.norm for reduce in reduces]
    weight_FC = torch.cat([reduce.weight for reduce in reduces]) if len(reduces) > 1 else reduces[0].weight
    folded = fold(norms, weight_FC.to(wide(x_BNC.dtype)))
    weight_FC, shift_F = (weight_FC, None) if folded is None else folded
    scale = None
    if x_BNC.dtype == torch.float16:
        # Rows longer than 1 may take a sum over channels out of float16's range; unit length comes next anyway.
        scale = torch.linalg.vector_norm(weight_FC.detach().float(), dim=1).amax().clamp_min(1)
        weight_FC, shift_F = weight_FC / scale, None if shift_F is None else shift_F / scale
    parts = list(_product(x_BNC, weight_FC, shift_F).chunk(len(reduces), dim=-1))
    if folded is None:
        if scale is not None:
            parts = [part.float() * scale for part in parts]
        parts = [normalize(norm, part, mask_BN) for norm, part in zip(norms, parts, strict=True)]
    return [_to_graphs(l2(part.unflatten(-1, (groups, -1)), -1).to(x_BNC.dtype), groups) for part in parts]


def _assign(value_ENr: Tensor, assigns: Sequence["Projection"], mask_BN: Tensor | None, groups: int) -> Tensor:
    """P or Q of all kernels before their normalisation: relu(norm(Psi V)), (E, N, D)."""
    folded = [fold([assign.norm], assign.weight.to(wide(value_ENr.dtype))) for assign in assigns]
    known = [pair for pair in folded if pair is not None]
    if len(known) == len(assigns):
        weight_GDr = torch.cat([weight.unflatten(0, (groups, -1)) for weight, _ in known], 1)
        shifts = [shift.unflatten(0, (groups, -1)) for _, shift in known if shift is not None]
        shift_GD = torch.cat(shifts, 1) if len(shifts) == len(known) else None
        return _grouped_product(value_ENr, weight_GDr, shift_GD).relu_()
    weight_GDr = torch.cat([assign.weight.unflatten(0, (groups, -1)) for assign in assigns], 1)
    y_END = _grouped_product(value_ENr, weight_GDr, None)
    parts = y_END.split([assign.weight.shape[0] // groups for assign in assigns], dim=-1)
    normalized = [
        _to_graphs(normalize(assign.norm, _to_nodes(part, groups), mask_BN).unflatten(-1, (groups, -1)), groups)
        for assign, part in zip(assigns, parts, strict=True)
    ]
    y_END = torch.cat(normalized, -1) if len(normalized) > 1 else normalized[0]
    return torch.relu(y_END).to(value_ENr.dtype)


def _grouped_product(x_ENF: Tensor, weight_GOF: Tensor, shift_GO: Tensor | None) -> Tensor:
    """x W_g^T + shift_g for the graphs of group g, (E, N, O)."""
    groups = weight_GOF.shape[0]
    if groups == 1:
        return _product(x_ENF, weight_GOF[0], None if shift_GO is None else shift_GO[0])
    batch = x_ENF.shape[0] // groups
    weight_EFO = weight_GOF.mT.to(x_ENF.dtype).repeat(batch, 1, 1)
    if shift_GO is None:
        return torch.bmm(x_ENF, weight_EFO)
    return torch.baddbmm(shift_GO.to(x_ENF.dtype).repeat(batch, 1)[:, None], x_ENF, weight_EFO)


def _unit_latents(assign_END: Tensor, num_latents: Sequence[int]) -> Tensor:
    """l2 over the latents of each kernel."""
    if len(num_latents) == 1:
        return l2(assign_END, -1)
    return torch.cat([l2(part, -1) for part in assign_END.split(list(num_latents), dim=-1)], -1)


def _fold_product(
    norm: nn.Module, feature_BGNF: Tensor, matrix_BGFC: Tensor, mask_BN: Tensor | None
) -> tuple[Tensor, Tensor | None] | None:
    """Fold the norm of feature @ matrix into the matrix: matrix and shift (G * C), or ``None`` where that cannot be."""
    if isinstance(norm, nn.Identity):
        return matrix_BGFC, None
    known = affine(norm)
    if known is None and uses_batch_statistics(norm):
        known = batch_affine(norm, *product_statistics(feature_BGNF, matrix_BGFC, mask_BN))
    if known is None:
        return None
    scale_C, shift_C = known
    return matrix_BGFC * scale_C.view(matrix_BGFC.shape[1], 1, -1), shift_C


def _graph_conv(
    scatter_END: Tensor, mixed_EDr: Tensor, conv: "Projection", mask_BN: Tensor | None, groups: int
) -> Tensor:
    """relu(norm(G O)) of one kernel with G moved onto the latents, (B, N, R)."""
    feature_BGND = scatter_END.unflatten(0, (-1, groups))
    weight_Grr = conv.weight.to(mixed_EDr.dtype).unflatten(0, (groups, -1))
    matrix_BGDr = mixed_EDr.unflatten(0, (-1, groups)) @ weight_Grr.mT
    folded = _fold_product(conv.norm, feature_BGND, matrix_BGDr, mask_BN)
    if folded is None:
        product_ENr = torch.bmm(scatter_END, matrix_BGDr.flatten(0, 1).to(scatter_END.dtype))
        y_BNR = normalize(conv.norm, _to_nodes(product_ENr, groups), mask_BN)
        return torch.relu(y_BNR).to(scatter_END.dtype)
    matrix_EDr = folded[0].flatten(0, 1).to(scatter_END.dtype)
    if folded[1] is None:
        return _to_nodes(torch.bmm(scatter_END, matrix_EDr).relu_(), groups)
    shift_E1r = folded[1].to(scatter_END.dtype).view(groups, -1).repeat(feature_BGND.shape[0], 1)[:, None]
    return _to_nodes(torch.baddbmm(shift_E1r, scatter_END, matrix_EDr).relu_(), groups)


def _expand_latents(
    scatters_END: Sequence[Tensor], mixed: Sequence[Tensor], weight_CF: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """U moved onto the latents: the assignments (B, N, D * G) and H = Y U^T (B, D * G, C)."""
    features, matrices = [], []
    for scatter_END, mixed_EDr, weight_CR in zip(scatters_END, mixed, weight_CF.chunk(len(mixed), dim=1), strict=True):
        weight_GrC = weight_CR.unflatten(1, (groups, -1)).permute(1, 2, 0)
        features.append(_to_nodes(scatter_END, groups))
        matrices.append((mixed_EDr.unflatten(0, (-1, groups)) @ weight_GrC).flatten(1, 2))
    if len(features) == 1:
        return features[0], matrices[0]
    return torch.cat(features, -1), torch.cat(matrices, 1)


def _residual(
    x_BNC: Tensor,
    feature_BNF: Tensor,
    matrix_BFC: Tensor,
    norm: nn.Module,
    gamma: Tensor | None,
    mask_BN: Tensor | None,
) -> Tensor:
    """x + gamma * norm(feature @ matrix), or norm(feature @ matrix) without gamma, with the strides of x."""
    if matrix_BFC.shape[0] == 1:
        # One matrix for all samples: their nodes are nodes of one sample, for statistics too.
        valid_1N = None if mask_BN is None else mask_BN.flatten()[None]
        folded = _fold_product(norm, feature_BNF.flatten(0, 1)[None, None], matrix_BFC[:, None], valid_1N)
    else:
        folded = _fold_product(norm, feature_BNF[:, None], matrix_BFC[:, None], mask_BN)
    if folded is None:
        y_BNC = normalize(norm, torch.matmul(feature_BNF, matrix_BFC.to(feature_BNF.dtype)), mask_BN)
        return (y_BNC if gamma is None else x_BNC + gamma * y_BNC).to(x_BNC.dtype)
    matrix_BFC, shift_C = folded[0][:, 0], folded[1]
    if gamma is not None:
        matrix_BFC = matrix_BFC * gamma
        shift_C = None if shift_C is None else shift_C * gamma
    matrix_BFC = matrix_BFC.to(feature_BNF.dtype).expand(feature_BNF.shape[0], -1, -1)
    shift_C = None if shift_C is None else shift_C.to(x_BNC.dtype)
    if x_BNC.stride(-1) == 1:
        return _add_product(x_BNC if gamma is not None else None, feature_BNF, matrix_BFC, shift_C, x_BNC.dtype)
    shift_C1 = None if shift_C is None else shift_C[:, None]
    return _add_product(
        x_BNC.mT if gamma is not None else None, matrix_BFC.mT, feature_BNF.mT, shift_C1, x_BNC.dtype
    ).mT


def _add_product(x: Tensor | None, left: Tensor, right: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x + shift + left @ right in one pass over the result."""
    if left.dtype != dtype:
        y = torch.bmm(left, right).to(dtype)
        y = y if shift is None else y + shift
        return y if x is None else y + x
    if x is None:
        return torch.bmm(left, right) if shift is None else torch.baddbmm(shift, left, right)
    # `baddbmm` starts from a copy of x; adding the shift takes that copy's place.
    return torch.baddbmm(x, left, right) if shift is None else (x + shift).baddbmm_(left, right)
