//! Tree ensembles: a few rows walk each tree side by side, so that their loads overlap.
//!
//! Node, feature and target numbers are taken as they are: the importer has checked them.
use super::{ArgFacts, Built, CpuShape, Family, KernelError, builder, cost, expr::Env, nest::Walk};
use crate::{
    targets::Target,
    tile::{Buf, Builder, Space, Val},
};
use pavage_ir::{DType, Dim, Heart, Op, Region, Scalar, ScalarFn, Schedule, attr::Aggregate};

/// `tree_ensemble`.
pub const FAMILY: Family = Family { name: "tree", about: "rows walk the trees side by side", schedules, build };

/// The leaf value of `mode`.
const LEAF: i64 = 6;
/// For each mode, in four bits: below 1, equal 2, above 4, unordered 8.
const HOLDS: i64 = 0xD2_4613;

fn schedules(region: &Region, target: &Target, _: &ArgFacts) -> Vec<Schedule> {
    match &region.heart {
        Heart::Op(Op::TreeEnsemble { targets, .. }) if *targets <= 4096 => {
            let rows = if matches!(target, Target::Cpu(_)) { 4 } else { 1 };
            vec![Schedule::new("tree", &[("rows", rows)])]
        }
        _ => vec![],
    }
}

fn build(region: &Region, schedule: &Schedule, target: &Target, name: &str, _: &ArgFacts) -> Result<Built, KernelError> {
    let Heart::Op(Op::TreeEnsemble { targets, aggregate }) = &region.heart else {
        return Err(KernelError::Unsupported { family: "tree", reason: "not a tree ensemble".into() });
    };
    let mut b = builder(name, target);
    let mut env = Env::new(&mut b, region);
    let side = schedule.knob("rows", 1).clamp(1, 16) as usize;
    let targets = *targets as i64;
    let forest = Forest {
        sums: b.alloc(Space::Local, DType::F64, (side as i64 * targets) as u64),
        named: b.alloc(Space::Local, DType::I32, (side as i64 * targets) as u64),
        args: env.args.clone(),
        side,
        targets,
        aggregate: *aggregate,
        dtype: region.args[0].dtype,
    };
    let x = &region.args[0];
    let (rows, features, trees) = (x.shape[0].clone(), x.shape[1].clone(), region.args[7].shape[0].clone());
    let groups = rows.ceil_div(&Dim::from(side));
    let (n, f, count) = (env.size(&mut b, &rows), env.size(&mut b, &features), env.size(&mut b, &trees));
    let walk = if matches!(target, Target::Cpu(_)) {
        let (lo, hi) = (b.lo(), b.hi());
        b.for_(lo, hi, 1, &[], |b, group, _| {
            let last = b.add_i(n, -1);
            let rows: Vec<Val> = (0..side as i64)
                .map(|i| {
                    let row = b.mul_i(group, side as i64);
                    let row = b.add_i(row, i);
                    // Beyond the end the last row is done again.
                    b.min(row, last)
                })
                .collect();
            forest.rows(b, &rows, f, count, env.outs[0]);
            vec![]
        });
        let unit_ps = trees * Dim::from(side as i64 * 25_000) + Dim::from(20_000i64);
        Walk { cpu: Some(CpuShape { extent: groups, grain: cost::grain(&unit_ps), unit_ps, scratch: Dim::ZERO }), grid: None }
    } else {
        b.launch().threads = 64;
        let (block, me) = (b.block_id(0), b.thread_id());
        let first = b.mul_i(block, 64);
        let row = b.add(first, me);
        let inside = b.lt(row, n);
        b.when(inside, |b| forest.rows(b, &[row], f, count, env.outs[0]));
        Walk { cpu: None, grid: Some([rows.ceil_div(&Dim::from(64i64)), Dim::one(), Dim::one()]) }
    };
    Ok(Built::new(b.finish(), schedule, env.dims, walk))
}

struct Forest {
    sums: Buf,
    named: Buf,
    args: Vec<Buf>,
    side: usize,
    targets: i64,
    aggregate: Aggregate,
    /// Of features and scores.
    dtype: DType,
}

impl Forest {
    fn int(&self, b: &mut Builder, arg: usize, at: Val) -> Val {
        let v = b.load(self.args[arg], at, 1);
        b.cast(v, DType::I64)
    }

    fn rows(&self, b: &mut Builder, rows: &[Val], features: Val, trees: Val, out: Buf) {
        let zero = b.index(0);
        let slots = b.index(self.side as i64 * self.targets);
        let (nothing, no) = (b.float(0.0, DType::F64), b.constant(Scalar::I(0), DType::I32));
        b.for_(zero, slots, 1, &[], |b, i, _| {
            b.store(self.sums, i, nothing);
            if self.keeps_names() {
                b.store(self.named, i, no);
            }
            vec![]
        });
        let starts: Vec<Val> = rows.iter().map(|r| b.mul(*r, features)).collect();
        b.for_(zero, trees, 1, &[], |b, tree, _| {
            let root = self.int(b, 7, tree);
            let nodes = self.walk(b, root, &starts);
            for (side, node) in nodes.into_iter().enumerate() {
                self.leaf(b, side, node);
            }
            vec![]
        });
        let n = b.index(self.targets);
        let scale = (self.aggregate == Aggregate::Mean).then(|| b.cast(trees, DType::F64));
        for (side, row) in rows.iter().enumerate() {
            let to = b.mul_i(*row, self.targets);
            b.for_(zero, n, 1, &[], |b, i, _| {
                let at = b.add_i(i, side as i64 * self.targets);
                let mut v = b.load(self.sums, at, 1);
                if let Some(scale) = scale {
                    v = b.div(v, scale);
                }
                let v = b.cast(v, self.dtype);
                let to = b.add(to, i);
                b.store(out, to, v);
                vec![]
            });
        }
    }

    fn keeps_names(&self) -> bool {
        matches!(self.aggregate, Aggregate::Min | Aggregate::Max)
    }

    /// The leaves that rows reach from `root`.
    fn walk(&self, b: &mut Builder, root: Val, starts: &[Val]) -> Vec<Val> {
        let init = vec![root; starts.len()];
        b.while_(
            &init,
            |b, nodes| {
                let leaf = b.index(LEAF);
                let mut go: Option<Val> = None;
                for node in nodes {
                    let mode = self.int(b, 2, *node);
                    let inner = b.ne(mode, leaf);
                    go = Some(go.map_or(inner, |g| b.or(g, inner)));
                }
                let go = go.unwrap_or_else(|| b.constant(Scalar::B(false), DType::Bool));
                (go, nodes.to_vec())
            },
            |b, nodes| nodes.iter().zip(starts).map(|(node, start)| self.descend(b, *node, *start)).collect(),
        )
    }

    /// The next node; a leaf is its own.
    fn descend(&self, b: &mut Builder, node: Val, start: Val) -> Val {
        let mode = self.int(b, 2, node);
        let leaf = b.index(LEAF);
        let at_leaf = b.eq(mode, leaf);
        let feature = self.int(b, 1, node);
        // A leaf's feature means nothing: read the first instead.
        let zero = b.index(0);
        let feature = b.select(at_leaf, zero, feature);
        let at = b.add(start, feature);
        let v = b.load(self.args[0], at, 1);
        let t = b.load(self.args[3], node, 1);
        let wide = b.ty(t).dtype() == DType::F64 || b.ty(v).dtype() == DType::F64;
        let dtype = if wide { DType::F64 } else { DType::F32 };
        let (v, t) = (b.cast(v, dtype), b.cast(t, dtype));
        let relation = |b: &mut Builder, code: i64, is: Val, other: Val| {
            let code = b.index(code);
            b.select(is, code, other)
        };
        let (below, above, equal) = (b.lt(v, t), b.gt(v, t), b.eq(v, t));
        let unordered = b.index(8);
        let r = relation(b, 4, above, unordered);
        let r = relation(b, 2, equal, r);
        let r = relation(b, 1, below, r);
        let table = b.index(HOLDS);
        let shift = b.mul_i(mode, 4);
        let bits = b.shr(table, shift);
        let hit = b.and(bits, r);
        let holds = b.ne(hit, zero);
        let missing = self.int(b, 6, node);
        let one = b.index(1);
        let defaults = b.eq(missing, one);
        let nan = b.map(ScalarFn::IsNan, &[v]);
        let defaults = b.and(defaults, nan);
        let holds = b.or(holds, defaults);
        let (yes, no) = (self.int(b, 4, node), self.int(b, 5, node));
        // Both are asked for before it is known which: of a choice between two loads a compiler makes one load, which waits for the condition.
        let more = b.sub(yes, no);
        let more = b.select(holds, more, zero);
        let next = b.add(no, more);
        b.select(at_leaf, node, next)
    }

    fn leaf(&self, b: &mut Builder, side: usize, node: Val) {
        let (from, to) = (self.int(b, 4, node), self.int(b, 5, node));
        b.for_(from, to, 1, &[], |b, j, _| {
            let target = self.int(b, 8, j);
            let at = b.add_i(target, side as i64 * self.targets);
            let w = b.load(self.args[9], j, 1);
            let w = b.cast(w, DType::F64);
            let old = b.load(self.sums, at, 1);
            let new = match self.aggregate {
                Aggregate::Sum | Aggregate::Mean => b.add(old, w),
                Aggregate::Min | Aggregate::Max => {
                    let f = if self.aggregate == Aggregate::Min { ScalarFn::Min } else { ScalarFn::Max };
                    let both = b.map(f, &[old, w]);
                    let named = b.load(self.named, at, 1);
                    let named = b.cast(named, DType::Bool);
                    let one = b.constant(Scalar::I(1), DType::I32);
                    b.store(self.named, at, one);
                    b.select(named, both, w)
                }
            };
            b.store(self.sums, at, new);
            vec![]
        });
    }
}
