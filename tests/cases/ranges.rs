//! Index values of the kernels that cases become on a GPU, in the interpreter: it holds each to what the analysis says of it,
//! which is what the lowering keeps in 32 bits.
use super::{cases, read};
use pavage::{
    ir::{Binding, DType, Graph, NodeKind, Value, region::Region},
    passes::{
        self, Ctx, build,
        eqsat::{self, cost},
    },
};
use pavage_codegen::{
    kernels::{self, ArgFacts},
    targets::Target,
    tile::{Ty, Val, interp::run_gpu, range::Ranges},
};
use std::collections::{BTreeMap, BTreeSet};

/// What every open size is.
const SIZE: i64 = 3;

/// The graph with its sizes fixed; none for one with other graphs inside.
fn fixed(graph: &Graph, sizes: &Binding) -> Option<Graph> {
    let mut new = Graph::new(graph.name.clone());
    let mut values: BTreeMap<Value, Value> = BTreeMap::new();
    for id in graph.inputs() {
        let NodeKind::Input(name) = &graph[*id].kind else { continue };
        values.insert((*id).into(), new.input(name, graph.ty((*id).into()).bind(sizes)));
    }
    for id in graph.schedule() {
        let node = match &graph[id].kind {
            NodeKind::Input(_) => continue,
            NodeKind::Const(t) => new.constant(t.clone()).node,
            NodeKind::Op(op, _) => {
                let operands: Vec<Value> = graph.operands(id).iter().map(|v| values[v]).collect();
                new.add_with(op.bind(sizes), &operands, vec![]).ok()?
            }
        };
        for result in 0..graph[id].types.len() as u32 {
            values.insert(Value { node: id, result }, Value { node, result });
        }
    }
    for out in &graph.outputs {
        new.output(out.name.clone(), values[&out.value]);
    }
    Some(new)
}

/// Bytes of an argument: floats near 1, integers small enough to be indices of anything.
fn data(dtype: DType, count: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; dtype.bytes(count)];
    if dtype == DType::F32 {
        bytes.chunks_mut(4).enumerate().for_each(|(i, b)| b.copy_from_slice(&(0.5 + (i % 7) as f32 / 8.0).to_le_bytes()));
    }
    bytes
}

/// Run a region's kernel; its index values, and how many of them fit 32 bits.
fn observe(region: &Region, sizes: &Binding) -> (usize, usize) {
    let built = kernels::build(region, &Target::parse("sm_90a").unwrap(), "k", &ArgFacts::default(), None).unwrap();
    let size = |d: &pavage::ir::Dim| d.eval(sizes).unwrap();
    let mut bufs: Vec<Vec<u8>> =
        region.args.iter().chain(region.outputs.iter().map(|o| &o.ty)).map(|t| data(t.dtype, t.shape.iter().map(&size).product::<i64>() as usize)).collect();
    let dims: Vec<i64> = built.dims.iter().map(&size).collect();
    let grid = built.grid.as_ref().unwrap().each_ref().map(|d| size(d) as u32);
    run_gpu(&built.kernel, &mut bufs, &dims, grid, 7).unwrap_or_else(|e| panic!("{e}\n{region}\n{}", built.kernel));
    let ranges = Ranges::of(&built.kernel);
    let indices: Vec<Val> = (0..built.kernel.types.len() as u32).map(Val).filter(|v| built.kernel.ty(*v) == Ty::INDEX).collect();
    (indices.len(), indices.iter().filter(|v| ranges.get(**v).fits_i32()).count())
}

#[test]
fn index_values_stay_within_their_ranges() {
    let ctx = Ctx { costs: cost::GPU, ..Ctx::default() };
    let (mut seen, mut all, mut narrow) = (BTreeSet::new(), 0, 0);
    for path in cases("optimize") {
        let (_, open) = read(&path);
        let sizes = Binding(open.symbols().iter().map(|s| (s.name.clone(), SIZE)).collect());
        let closed = fixed(&open, &sizes);
        for (mut graph, is_fixed) in [(open, false)].into_iter().chain(closed.map(|g| (g, true))) {
            passes::run(&mut graph, &ctx, passes::PIPELINE).unwrap();
            let program = build::program("fused", &graph, &|g: &Graph| eqsat::optimise(g, &ctx), &ctx).unwrap();
            for (region, _) in program.body.regions() {
                if seen.insert(region.to_string()) {
                    let (n, fits) = observe(region, &sizes);
                    (all, narrow) = if is_fixed { (all + n, narrow + fits) } else { (all, narrow) };
                }
            }
        }
    }
    assert!(narrow * 100 >= all * 95, "of {all} indices of kernels for fixed sizes, {narrow} fit 32 bits");
}
