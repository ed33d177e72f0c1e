//! Nested blocks as one list of steps with jumps.
use crate::tile::{Block, Kernel, Op, Stmt};

/// One step of an agent.
#[derive(Clone, Copy)]
pub(super) enum Step<'k> {
    /// A statement without blocks.
    Do(&'k Stmt),
    /// Split the mask by the condition; to `other` when no thread takes the first branch.
    If { stmt: &'k Stmt, other: usize },
    /// End of the first branch: on to the other threads, or to `end` when there are none.
    Else { stmt: &'k Stmt, end: usize },
    /// Both branches are done.
    EndIf { stmt: &'k Stmt },
    /// Set up a counted loop.
    For { stmt: &'k Stmt },
    /// Drop threads whose counter is at the end; to `end` when none is left.
    ForTest { stmt: &'k Stmt, end: usize },
    /// Next values and counter; back to `test`.
    ForNext { stmt: &'k Stmt, test: usize },
    /// Set up a `while`.
    While { stmt: &'k Stmt },
    /// Drop threads whose condition is false; to `end` when none is left.
    WhileTest { stmt: &'k Stmt, end: usize },
    /// Next values; back to `test`.
    WhileNext { stmt: &'k Stmt, test: usize },
    /// A loop is over.
    EndLoop,
    /// A device word with blocks: which one this agent takes is the word's business. `starts` indexes [`Step::Goto`]s.
    Choose { stmt: &'k Stmt, first: usize },
    /// Jump.
    Goto(usize),
}

impl Step<'_> {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Step::Do(s) => s.op.name(),
            Step::If { .. } | Step::Else { .. } | Step::EndIf { .. } => "if",
            Step::For { .. } | Step::ForTest { .. } | Step::ForNext { .. } => "for",
            Step::While { .. } | Step::WhileTest { .. } | Step::WhileNext { .. } => "while",
            Step::EndLoop => "end of a loop",
            Step::Choose { stmt, .. } => stmt.op.name(),
            Step::Goto(_) => "a jump",
        }
    }
}

pub(super) fn flatten(kernel: &Kernel) -> Vec<Step<'_>> {
    let mut out = vec![];
    block(&kernel.body, &mut out);
    out
}

fn block<'k>(b: &'k Block, out: &mut Vec<Step<'k>>) {
    for stmt in &b.stmts {
        match stmt.op {
            Op::If => {
                let at = out.len();
                out.push(Step::If { stmt, other: 0 });
                block(&stmt.blocks[0], out);
                let mid = out.len();
                out.push(Step::Else { stmt, end: 0 });
                block(&stmt.blocks[1], out);
                let end = out.len();
                out.push(Step::EndIf { stmt });
                out[at] = Step::If { stmt, other: mid };
                out[mid] = Step::Else { stmt, end };
            }
            Op::For => {
                out.push(Step::For { stmt });
                let test = out.len();
                out.push(Step::ForTest { stmt, end: 0 });
                block(&stmt.blocks[0], out);
                out.push(Step::ForNext { stmt, test });
                out[test] = Step::ForTest { stmt, end: out.len() };
                out.push(Step::EndLoop);
            }
            Op::While => {
                out.push(Step::While { stmt });
                let first = out.len();
                block(&stmt.blocks[0], out);
                let test = out.len();
                out.push(Step::WhileTest { stmt, end: 0 });
                block(&stmt.blocks[1], out);
                out.push(Step::WhileNext { stmt, test: first });
                out[test] = Step::WhileTest { stmt, end: out.len() };
                out.push(Step::EndLoop);
            }
            _ if !stmt.blocks.is_empty() => {
                out.push(Step::Choose { stmt, first: out.len() + 1 });
                let first = out.len();
                // One jump a block, then the blocks, each ending in a jump to the common end.
                out.extend(stmt.blocks.iter().map(|_| Step::Goto(0)));
                let mut ends = vec![];
                for (i, b) in stmt.blocks.iter().enumerate() {
                    out[first + i] = Step::Goto(out.len());
                    block(b, out);
                    ends.push(out.len());
                    out.push(Step::Goto(0));
                }
                let end = out.len();
                for e in ends {
                    out[e] = Step::Goto(end);
                }
            }
            _ => out.push(Step::Do(stmt)),
        }
    }
}
