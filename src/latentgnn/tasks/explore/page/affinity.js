// One row or column of a block's affinity Q^T A P, in D x N products; the N x N matrix is never made.

// graphs: of the kernels and groups that are shown, each with D latents and float32 arrays gather P (D x N),
// scatter Q (D x N) and affinity A (D x D). The result is their mean, as `latentgnn.inspection.Seen.row` gives it.
// isOn(graph, latent) says whether a latent's part is added.
export function line(graphs, node, nodes, listeners, isOn) {
  const out = new Float32Array(nodes);
  for (const graph of graphs) {
    const [near, far] = listeners ? [graph.gather, graph.scatter] : [graph.scatter, graph.gather];
    const weights = throughLatents(graph, near, node, nodes, listeners);
    for (let latent = 0; latent < graph.latents; latent++) {
      const weight = weights[latent] / graphs.length;
      if (weight === 0 || !isOn(graph, latent)) continue;
      const start = latent * nodes;
      for (let n = 0; n < nodes; n++) out[n] += weight * far[start + n];
    }
  }
  return out;
}

// A^T q of a row, A p of a column.
function throughLatents(graph, near, node, nodes, listeners) {
  const size = graph.latents;
  const weights = new Float64Array(size);
  for (let from = 0; from < size; from++) {
    const share = near[from * nodes + node];
    if (share === 0) continue;
    for (let to = 0; to < size; to++) {
      weights[to] += share * (listeners ? graph.affinity[to * size + from] : graph.affinity[from * size + to]);
    }
  }
  return weights;
}

// The smallest part of the nodes that holds half of a row.
export function halfIsIn(weights, sum) {
  const sorted = Float32Array.from(weights).sort();
  let held = 0;
  let count = 0;
  while (count < sorted.length && held < sum / 2) held += sorted[sorted.length - 1 - count++];
  return count / sorted.length;
}
