//! The checker: what the interpreter and the lowerings rely on.
//!
//! Every value is defined once, before its use, in its block or one around it. Operands and results of every
//! operation have the types its row says. Buffers are of spaces that the operation reaches; arguments declared
//! `read` are not stored to, nor `write` ones loaded. Device operations are on their device. Launch limits hold.
use super::{Access, Block, BufInfo, Device, DotKind, Kernel, Op, ReduceFn, Space, Stmt, Ty, Val, VoteKind};
use pavage_ir::{DType, Scalar, ScalarFn};
use std::fmt;

/// What is wrong with a kernel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("kernel {kernel}: {at}: {why}")]
pub struct CheckError {
    /// Kernel name.
    pub kernel: String,
    /// The statement or declaration.
    pub at: String,
    /// What is wrong with it.
    pub why: String,
}

/// Limits of the device that a kernel must keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Shared bytes of one block.
    pub shared_bytes: u64,
    /// Threads of one block.
    pub threads: u32,
    /// Vector registers (CPU).
    pub vector_regs: u32,
    /// Bytes of one vector register (CPU).
    pub vector_bytes: u32,
}

/// What a kernel needs, as reported by [`check`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Shared bytes of one block.
    pub shared_bytes: u64,
    /// Most vector registers live at once, by a scan in text order that knows no spilling.
    pub vector_regs: u32,
}

impl Needs {
    /// Whether the vectors fit the registers, with two to spare where there are 32.
    pub fn fits(&self, limits: &Limits) -> bool {
        let spare = if limits.vector_regs >= 32 { 2 } else { 0 };
        self.vector_regs + spare <= limits.vector_regs
    }
}

impl fmt::Display for Needs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} vector registers, {} shared bytes", self.vector_regs, self.shared_bytes)
    }
}

/// Check `kernel` against the rules above and `limits`.
pub fn check(kernel: &Kernel, limits: &Limits) -> Result<Needs, CheckError> {
    let fail = |at: String, why: String| CheckError { kernel: kernel.name.clone(), at, why };
    let mut c = Checker { kernel, defined: vec![false; kernel.types.len()] };
    c.declarations(limits).map_err(|(at, why)| fail(at, why))?;
    for d in &kernel.dims {
        c.define(*d).map_err(|why| fail(format!("dim {d}"), why))?;
    }
    c.block(&kernel.body).map_err(|(at, why)| fail(at, why))?;
    super::hopper_check::check(kernel).map_err(|(at, why)| fail(at, why))?;
    let vector_regs = pressure(kernel, limits.vector_bytes);
    Ok(Needs { shared_bytes: kernel.shared_bytes(), vector_regs })
}

type At<T> = Result<T, (String, String)>;

struct Checker<'k> {
    kernel: &'k Kernel,
    /// Whether a value is defined and in scope here.
    defined: Vec<bool>,
}

impl Checker<'_> {
    fn declarations(&self, limits: &Limits) -> At<()> {
        let k = self.kernel;
        let header = |why: String| Err(("header".to_owned(), why));
        if !is_identifier(&k.name) {
            return header(format!("`{}` is not a C identifier", k.name));
        }
        for (i, b) in k.bufs.iter().enumerate() {
            let at = |why: &str| Err((format!("@{i}"), why.to_owned()));
            if b.dtype == DType::Str {
                return at("text has no place in a kernel");
            }
            if b.align != 0 && !b.align.is_power_of_two() {
                return at("alignment is a power of two");
            }
            if let Some((of, _)) = b.alias {
                match k.bufs.get(of.0 as usize) {
                    Some(o) if o.space == b.space && o.alias.is_none() => {}
                    _ => return at("aliases a buffer of the same space that is no alias itself"),
                }
            }
            let cpu = matches!(k.device, Device::Cpu { .. });
            match b.space {
                Space::Shared if cpu => return at("no shared memory on the CPU"),
                Space::Shared if b.len.is_none() && k.bufs.iter().filter(|o| o.space == Space::Shared && o.len.is_none() && o.alias.is_none()).count() > 1 => {
                    return at("only one buffer may be open-ended");
                }
                Space::Local if b.len.is_none() && !cpu => {
                    return at("local memory of a GPU thread has a fixed size");
                }
                _ => {}
            }
        }
        if k.device == Device::Gpu {
            if k.launch.threads == 0 || k.launch.threads > limits.threads {
                return header(format!("{} threads a block, the limit is {}", k.launch.threads, limits.threads));
            }
            if k.shared_bytes() > limits.shared_bytes {
                return header(format!("{} shared bytes, the limit is {}", k.shared_bytes(), limits.shared_bytes));
            }
            if k.launch.cluster.iter().product::<u32>() == 0 || k.launch.cluster.iter().product::<u32>() > 16 {
                return header("a cluster has 1 to 16 blocks".to_owned());
            }
        }
        Ok(())
    }

    fn define(&mut self, v: Val) -> Result<(), String> {
        match self.defined.get_mut(v.0 as usize) {
            Some(d) if !*d => {
                *d = true;
                let lanes = self.kernel.ty(v);
                if !lanes.is_scalar() && lanes.lanes() < 2 {
                    return Err(format!("{v}: {lanes} has fewer than 2 lanes"));
                }
                Ok(())
            }
            Some(_) => Err(format!("{v} is defined twice")),
            None => Err(format!("{v} has no type")),
        }
    }

    fn used(&self, vals: &[Val]) -> Result<(), String> {
        match vals.iter().find(|v| !self.defined.get(v.0 as usize).copied().unwrap_or(false)) {
            Some(v) => Err(format!("{v} is not defined here")),
            None => Ok(()),
        }
    }

    fn block(&mut self, block: &Block) -> At<()> {
        let mut here = vec![];
        for p in &block.params {
            self.define(*p).map_err(|why| ("block".to_owned(), why))?;
            here.push(*p);
        }
        for stmt in &block.stmts {
            self.stmt(stmt)?;
            here.extend(&stmt.results);
        }
        self.used(&block.yields).map_err(|why| ("yield".to_owned(), why))?;
        // Out of scope, but still not free to be defined again: numbering is unique.
        for v in here {
            self.defined[v.0 as usize] = false;
        }
        Ok(())
    }

    fn stmt(&mut self, stmt: &Stmt) -> At<()> {
        let name = match stmt.results.first() {
            Some(r) => format!("{r} = {}", stmt.op.name()),
            None => stmt.op.name().to_owned(),
        };
        let wrap = |why: String| (name.clone(), why);
        self.used(&stmt.args).map_err(wrap)?;
        let mut bufs = vec![];
        for b in &stmt.bufs {
            bufs.push(self.kernel.bufs.get(b.0 as usize).ok_or_else(|| wrap(format!("{b} is not declared")))?);
        }
        let args: Vec<Ty> = stmt.args.iter().map(|v| self.kernel.ty(*v)).collect();
        let tys = |vals: &[Val]| -> Result<Vec<Ty>, String> {
            vals.iter().map(|v| self.kernel.types.get(v.0 as usize).copied().ok_or_else(|| format!("{v} has no type"))).collect()
        };
        let results = tys(&stmt.results).map_err(wrap)?;
        let mut shapes = vec![];
        for b in &stmt.blocks {
            shapes.push((tys(&b.params).map_err(wrap)?, tys(&b.yields).map_err(wrap)?));
        }
        rule(&self.kernel.device, &stmt.op, &args, &bufs, &shapes, &results).map_err(wrap)?;
        for b in &stmt.blocks {
            self.block(b)?;
        }
        for r in &stmt.results {
            self.define(*r).map_err(wrap)?;
        }
        Ok(())
    }
}

fn is_identifier(s: &str) -> bool {
    let mut chars = s.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_') && chars.all(|c| c.is_ascii_alphanumeric() || c == '_')
}

fn need(ok: bool, why: impl Fn() -> String) -> Result<(), String> {
    if ok { Ok(()) } else { Err(why()) }
}

fn show(types: &[Ty]) -> String {
    types.iter().map(Ty::to_string).collect::<Vec<_>>().join(", ")
}

fn same(got: &[Ty], want: &[Ty], what: &str) -> Result<(), String> {
    need(got == want, || format!("{what}: expected ({}), got ({})", show(want), show(got)))
}

type BlockTypes = (Vec<Ty>, Vec<Ty>);

/// The type rule of one statement.
fn rule(device: &Device, op: &Op, args: &[Ty], bufs: &[&BufInfo], blocks: &[BlockTypes], results: &[Ty]) -> Result<(), String> {
    let wants = |n_args: std::ops::RangeInclusive<usize>, n_bufs: usize, n_results: usize| {
        need(n_args.contains(&args.len()), || format!("takes {n_args:?} values, got {}", args.len()))?;
        need(bufs.len() == n_bufs, || format!("takes {n_bufs} buffers, got {}", bufs.len()))?;
        need(results.len() == n_results, || format!("gives {n_results} values, got {}", results.len()))
    };
    let cpu = matches!(device, Device::Cpu { .. });
    let blocks_wanted = match op {
        Op::For => 1,
        Op::If | Op::While => 2,
        Op::Hopper(_) | Op::Mma(_) => blocks.len(),
        _ => 0,
    };
    need(blocks.len() == blocks_wanted, || format!("takes {blocks_wanted} blocks, got {}", blocks.len()))?;
    need(!cpu || results.iter().all(|t| !matches!(t, Ty::Frag(..))), || "fragments are for GPU kernels".to_owned())?;
    match op {
        Op::Const(c) => {
            wants(0..=0, 0, 1)?;
            let d = results[0].dtype();
            need(
                matches!((c, d), (Scalar::B(_), DType::Bool)) || matches!(c, Scalar::F(_)) && d.is_float() || matches!(c, Scalar::I(_)) && d.is_int(),
                || format!("{c:?} is no {d}"),
            )?;
            need(c.cast(d) == *c || matches!(c, Scalar::F(v) if v.is_nan()), || format!("{c:?} is not a value of {d}"))
        }
        Op::Map(f) => {
            wants(f.arity()..=f.arity(), 0, 1)?;
            let dtypes: Vec<DType> = args.iter().map(|t| t.dtype()).collect();
            let want = args.last().map_or(results[0], |t| t.with(DType::Bool));
            let d = f.infer(&dtypes)?;
            let cond_ok = |i: usize, t: &Ty| t.with(DType::Bool) == want || (*f == ScalarFn::Select && i == 0 && t.is_scalar());
            need(args.iter().enumerate().all(|(i, t)| cond_ok(i, t)), || format!("shapes differ: {}", show(args)))?;
            same(results, &[want.with(d)], "result")
        }
        Op::Cast => {
            wants(1..=1, 0, 1)?;
            same(&[results[0].with(args[0].dtype())], args, "shape")
        }
        Op::Bitcast => {
            wants(1..=1, 0, 1)?;
            let bits = |t: Ty| t.dtype().bits() * t.lanes();
            need(bits(args[0]) == bits(results[0]) && args[0].dtype() != DType::Bool && results[0].dtype() != DType::Bool, || {
                format!("{} and {} differ in width, or are bool", args[0], results[0])
            })
        }
        Op::Splat => {
            wants(1..=1, 0, 1)?;
            same(args, &[Ty::Scalar(results[0].dtype())], "operand")
        }
        Op::Extract(i) => {
            wants(1..=1, 0, 1)?;
            need(usize::from(*i) < args[0].lanes(), || format!("lane {i} of {}", args[0]))?;
            same(results, &[Ty::Scalar(args[0].dtype())], "result")
        }
        Op::Insert(i) => {
            wants(2..=2, 0, 1)?;
            need(usize::from(*i) < args[0].lanes(), || format!("lane {i} of {}", args[0]))?;
            same(args, &[results[0], Ty::Scalar(results[0].dtype())], "operands")
        }
        Op::Pack => {
            wants(results.first().map_or(0, |t| t.lanes())..=results.first().map_or(0, |t| t.lanes()), 0, 1)?;
            same(args, &vec![Ty::Scalar(results[0].dtype()); args.len()], "operands")
        }
        Op::Iota => {
            wants(0..=0, 0, 1)?;
            need(results[0].dtype().is_int(), || "needs an integer dtype".to_owned())
        }
        Op::Shuffle(mask) => {
            wants(2..=2, 0, 1)?;
            need(args[0] == args[1] && !matches!(args[0], Ty::Frag(..)), || format!("needs two equal vectors, got {}", show(args)))?;
            need(mask.iter().all(|m| usize::from(*m) < 2 * args[0].lanes()), || "a lane of the mask is out of range".to_owned())?;
            same(results, &[Ty::of_lanes(args[0].dtype(), mask.len().max(1))], "result")
        }
        Op::Reduce(r) => {
            wants(1..=1, 0, 1)?;
            let d = args[0].dtype();
            let ok = if matches!(r, ReduceFn::And | ReduceFn::Or) { !d.is_float() } else { d != DType::Bool };
            need(ok && args[0].lanes().is_power_of_two(), || format!("cannot reduce {}", args[0]))?;
            same(results, &[Ty::Scalar(d)], "result")
        }
        Op::LaneMask => {
            wants(1..=1, 0, 1)?;
            same(args, &[Ty::INDEX], "operand")?;
            need(results[0].dtype() == DType::Bool, || "gives bool".to_owned())
        }
        Op::Load { .. } => {
            wants(1..=2, 1, 1)?;
            memory(bufs[0], results[0], Access::Read)?;
            same(&args[..1], &[Ty::INDEX], "index")?;
            mask(args.get(1), results[0])
        }
        Op::Store { .. } => {
            wants(2..=3, 1, 0)?;
            memory(bufs[0], args[1], Access::Write)?;
            same(&args[..1], &[Ty::INDEX], "index")?;
            mask(args.get(2), args[1])
        }
        Op::Gather { .. } => {
            wants(1..=2, 1, 1)?;
            memory(bufs[0], results[0], Access::Read)?;
            indices(args[0], results[0])?;
            mask(args.get(1), results[0])
        }
        Op::Scatter { .. } => {
            wants(2..=3, 1, 0)?;
            memory(bufs[0], args[1], Access::Write)?;
            indices(args[0], args[1])?;
            mask(args.get(2), args[1])
        }
        Op::AtomicAdd { .. } => {
            wants(2..=2, 1, 0)?;
            memory(bufs[0], args[1], Access::Write)?;
            need(args[1].is_scalar(), || "adds a scalar".to_owned())?;
            same(&args[..1], &[Ty::INDEX], "index")
        }
        Op::Prefetch { .. } => {
            wants(1..=1, 1, 0)?;
            same(args, &[Ty::INDEX], "index")
        }
        Op::Dot(kind) => {
            let (lanes, want): (usize, Vec<Ty>) = match (kind, results) {
                (DotKind::I16Pairs, [Ty::Vec(DType::I32, n)]) => (2, vec![Ty::Vec(DType::I16, 2 * n); 2]),
                (DotKind::U8I8PairsSat, [Ty::Vec(DType::I16, n)]) => (2, vec![Ty::Vec(DType::U8, 2 * n), Ty::Vec(DType::I8, 2 * n)]),
                (DotKind::U8I8Quads, [Ty::Vec(DType::I32, n)]) => (3, vec![Ty::Vec(DType::I32, *n), Ty::Vec(DType::U8, 4 * n), Ty::Vec(DType::I8, 4 * n)]),
                _ => return Err(format!("cannot give ({})", show(results))),
            };
            wants(lanes..=lanes, 0, 1)?;
            need(cpu, || "is for CPU kernels".to_owned())?;
            same(args, &want, "operands")
        }
        Op::For => {
            need(args.len() >= 3, || "needs lo, hi, step".to_owned())?;
            same(&args[..3], &[Ty::INDEX; 3], "bounds")?;
            let carried = &args[3..];
            same(&blocks[0].0, &[&[Ty::INDEX], carried].concat(), "block parameters")?;
            same(&blocks[0].1, carried, "yields")?;
            same(results, carried, "results")
        }
        Op::If => {
            wants(1..=1, 0, results.len())?;
            same(args, &[Ty::BOOL], "condition")?;
            for b in blocks {
                same(&b.0, &[], "block parameters")?;
                same(&b.1, results, "yields")?;
            }
            Ok(())
        }
        Op::While => {
            same(&blocks[0].0, args, "block parameters")?;
            need(blocks[0].1.first() == Some(&Ty::BOOL), || "the first block yields a condition first".to_owned())?;
            same(&blocks[0].1[1..], results, "yields of the first block")?;
            same(&blocks[1].0, results, "parameters of the second block")?;
            same(&blocks[1].1, args, "yields of the second block")
        }
        Op::Lo | Op::Hi => {
            wants(0..=0, 0, 1)?;
            need(cpu, || "is for CPU kernels".to_owned())?;
            same(results, &[Ty::INDEX], "result")
        }
        Op::BlockId(_) | Op::GridDim(_) | Op::ThreadId | Op::LaneId => {
            wants(0..=0, 0, 1)?;
            if let Op::BlockId(axis) | Op::GridDim(axis) = op {
                need(*axis < 3, || "a grid has three axes".to_owned())?;
            }
            need(!cpu, || "is for GPU kernels".to_owned())?;
            same(results, &[Ty::INDEX], "result")
        }
        Op::Barrier => {
            wants(0..=0, 0, 0)?;
            need(!cpu, || "is for GPU kernels".to_owned())
        }
        Op::Shfl(_) => {
            wants(2..=2, 0, 1)?;
            need(!cpu, || "is for GPU kernels".to_owned())?;
            same(&args[1..], &[Ty::INDEX], "lane")?;
            same(results, &args[..1], "result")
        }
        Op::Vote(kind) => {
            wants(1..=1, 0, 1)?;
            need(!cpu, || "is for GPU kernels".to_owned())?;
            same(args, &[Ty::BOOL], "operand")?;
            let d = if *kind == VoteKind::Ballot { DType::U32 } else { DType::Bool };
            same(results, &[Ty::Scalar(d)], "result")
        }
        Op::Mma(w) => {
            need(!cpu, || "is for GPU kernels".to_owned())?;
            w.check(args, bufs, results)
        }
        Op::Hopper(w) => {
            need(!cpu, || "is for GPU kernels".to_owned())?;
            w.check(args, bufs, results)
        }
    }
}

fn memory(buf: &BufInfo, value: Ty, how: Access) -> Result<(), String> {
    need(buf.dtype == value.dtype(), || format!("{} beside a buffer of {}", value, buf.dtype))?;
    need(!matches!(value, Ty::Frag(..)), || "a fragment is not contiguous in memory".to_owned())?;
    need(buf.space != Space::Global || buf.access == Access::ReadWrite || buf.access == how, || format!("the argument is declared `{}`", buf.access.name()))
}

fn mask(mask: Option<&Ty>, value: Ty) -> Result<(), String> {
    match mask {
        Some(m) => same(&[*m], &[value.with(DType::Bool)], "mask"),
        None => Ok(()),
    }
}

fn indices(indices: Ty, value: Ty) -> Result<(), String> {
    need(matches!(indices.dtype(), DType::I32 | DType::I64), || "indices are i32 or i64".to_owned())?;
    same(&[indices.with(value.dtype())], &[value], "indices and value")
}

/// Most vector registers live at once, walking the text and taking a value as live from its definition to its last use;
/// what a loop uses from outside lives through it. Splatted scalars used by one statement next to them count once.
fn pressure(kernel: &Kernel, vector_bytes: u32) -> u32 {
    if !matches!(kernel.device, Device::Cpu { .. }) || vector_bytes == 0 {
        return 0;
    }
    let regs = |v: Val| match kernel.ty(v) {
        Ty::Vec(DType::Bool, _) | Ty::Scalar(_) => 0,
        t => (t.dtype().bytes(t.lanes()) as u32).div_ceil(vector_bytes),
    };
    // Statement numbers in text order; a value used inside a loop but defined before it is used until the loop's end.
    let mut scan = Scan { at: 0, born: vec![0; kernel.types.len()], last: vec![0; kernel.types.len()] };
    scan.block(&kernel.body);
    let mut change = vec![0i64; scan.at + 2];
    for (i, (born, last)) in scan.born.iter().zip(&scan.last).enumerate() {
        if last > born {
            change[*born] += i64::from(regs(Val(i as u32)));
            change[*last] -= i64::from(regs(Val(i as u32)));
        }
    }
    let mut live = 0;
    change
        .iter()
        .map(|c| {
            live += c;
            live
        })
        .max()
        .unwrap_or(0) as u32
}

struct Scan {
    at: usize,
    born: Vec<usize>,
    last: Vec<usize>,
}

impl Scan {
    fn block(&mut self, block: &Block) {
        for p in &block.params {
            self.born[p.0 as usize] = self.at;
        }
        for s in &block.stmts {
            self.at += 1;
            for a in &s.args {
                self.last[a.0 as usize] = self.at;
            }
            let start = self.at;
            for b in &s.blocks {
                self.block(b);
            }
            if !s.blocks.is_empty() {
                self.at += 1;
                let loops = matches!(s.op, Op::For | Op::While);
                for v in 0..self.last.len() {
                    if loops && self.born[v] < start && self.last[v] > start {
                        self.last[v] = self.at;
                    }
                }
            }
            for r in &s.results {
                self.born[r.0 as usize] = self.at;
            }
        }
        for y in &block.yields {
            self.last[y.0 as usize] = self.at + 1;
        }
    }
}
