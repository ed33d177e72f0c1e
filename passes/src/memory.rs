//! Memory: which buffers may share storage for a reason the runtime cannot see.
//!
//! Placing temporaries by live range is the runtime's, once sizes are known. Here a kernel that writes each
//! element right where it last read it gets its result in place of its operand.
use pavage_ir::{
    Dim, Expr, Heart, Region,
    program::{Body, BufId, BufferKind, Step},
};

/// Turn outputs of map regions into views of an operand that dies there, where element `i` depends on element `i` alone.
pub fn in_place(body: &mut Body) {
    for step in &mut body.steps {
        match step {
            Step::If { then_body, else_body, .. } => {
                in_place(then_body);
                in_place(else_body);
            }
            Step::Loop { body, .. } => in_place(body),
            Step::Run { .. } | Step::Copy { .. } | Step::Bind { .. } => {}
        }
    }
    for at in 0..body.steps.len() {
        let Step::Run { region, args, outputs, .. } = &body.steps[at] else { continue };
        let [out] = outputs.as_slice() else { continue };
        if !matches!(body.buffers[out.index()].kind, BufferKind::Temp) || writers(body, *out) != 1 {
            continue;
        }
        let reusable = args.iter().enumerate().find(|(i, arg)| {
            let buffer = &body.buffers[arg.index()];
            matches!(buffer.kind, BufferKind::Temp)
                && buffer.ty == body.buffers[out.index()].ty
                && args.iter().filter(|a| a == arg).count() == 1
                && elementwise_in(region, *i)
                && dies(body, **arg, at)
        });
        if let Some((_, &arg)) = reusable {
            let out = *out;
            body.buffers[out.index()].kind = BufferKind::View(arg);
        }
    }
}

/// How many regions write into a buffer: each but a part where they are several.
fn writers(body: &Body, buf: BufId) -> usize {
    body.steps.iter().filter(|s| matches!(s, Step::Run { outputs, .. } if outputs.contains(&buf))).count()
}

/// Whether a map region reads argument `arg` only at the point it writes.
fn elementwise_in(region: &Region, arg: usize) -> bool {
    let identity = |index: &[Dim]| index.iter().enumerate().all(|(i, d)| *d == Dim::axis(i));
    matches!(region.heart, Heart::Map)
        && region.outputs.iter().all(|o| identity(&o.index))
        && region.exprs.iter().all(|(e, _)| match e {
            Expr::Load { arg: a, index, .. } => *a as usize != arg || (identity(index) && index.len() == region.space.len()),
            _ => true,
        })
}

/// Whether nothing after step `at` reads `buf` or a view of it, nor is it an output or captured.
fn dies(body: &Body, buf: BufId, at: usize) -> bool {
    let root = |mut b: BufId| {
        while let BufferKind::View(of) = body.buffers[b.index()].kind {
            b = of;
        }
        b
    };
    let mine = root(buf);
    let touches = |b: &BufId| root(*b) == mine;
    let views = body.buffers.iter().enumerate().any(|(i, b)| matches!(b.kind, BufferKind::View(_)) && root(BufId(i as u32)) == mine);
    if views || body.outputs.iter().any(touches) {
        return false;
    }
    body.steps.iter().enumerate().all(|(i, step)| match step {
        Step::Run { args, outputs, .. } => i <= at || !(args.iter().any(touches) || outputs.iter().any(touches)),
        Step::Copy { from, to } => i <= at || !(touches(from) || touches(to)),
        Step::Bind { buffer, .. } => i <= at || !touches(buffer),
        // Nested bodies capture by buffer: keep clear of anything they may name.
        Step::If { .. } | Step::Loop { .. } => i < at && !captures(step, mine),
    })
}

fn captures(step: &Step, buf: BufId) -> bool {
    let in_body = |b: &Body| b.buffers.iter().any(|x| matches!(x.kind, BufferKind::Captured(of) if of == buf));
    match step {
        Step::If { cond, then_body, else_body, outputs } => *cond == buf || outputs.contains(&buf) || in_body(then_body) || in_body(else_body),
        Step::Loop { trip, cond, body, carried, outputs } => [trip, cond].contains(&&buf) || carried.contains(&buf) || outputs.contains(&buf) || in_body(body),
        Step::Run { .. } | Step::Copy { .. } | Step::Bind { .. } => false,
    }
}
