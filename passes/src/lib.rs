//! Graph to graph to regions: folding, e-graph rewriting, fusion, memory planning.
