//! Which code runs on which GPU.
use crate::plan::{CodeEntry, CodeKind, Plan};

/// Compute capability: major, minor.
pub(crate) type Capability = (u32, u32);

/// A GPU target: `sm_80`, `sm_90a`, `sm_100f`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arch {
    major: u32,
    minor: u32,
    reach: Reach,
}

/// Which other GPUs may run code of an architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reach {
    /// Later ones too.
    Forward,
    /// Later ones of its family (`f`).
    Family,
    /// None (`a`).
    Exact,
}

impl Arch {
    pub(crate) fn parse(target: &str) -> Option<Arch> {
        let text = target.strip_prefix("sm_")?;
        let (digits, reach) = match text.strip_suffix('a') {
            Some(rest) => (rest, Reach::Exact),
            None => match text.strip_suffix('f') {
                Some(rest) => (rest, Reach::Family),
                None => (text, Reach::Forward),
            },
        };
        if !(2..=4).contains(&digits.len()) || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let number: u32 = digits.parse().ok()?;
        Some(Arch { major: number / 10, minor: number % 10, reach })
    }

    /// Whether a GPU of this capability runs it; SASS (`cubin`) does not cross majors.
    fn runs_on(self, gpu: Capability, kind: CodeKind) -> bool {
        let own = (self.major, self.minor);
        match (self.reach, kind) {
            (_, CodeKind::SharedObject) => false,
            (Reach::Exact, _) => gpu == own,
            (Reach::Family, _) | (_, CodeKind::Cubin) => gpu.0 == own.0 && gpu >= own,
            (Reach::Forward, CodeKind::Ptx) => gpu >= own,
        }
    }
}

/// The plan whose code is closest to the GPU, of those that run on it.
pub(crate) fn best<'a>(gpu: Capability, candidates: &[(&'a Plan, &'a CodeEntry)]) -> Option<&'a Plan> {
    let rank = |code: &CodeEntry| {
        let arch = Arch::parse(&code.target).filter(|a| a.runs_on(gpu, code.kind))?;
        Some((arch.major, arch.minor, arch.reach))
    };
    let ranked = candidates.iter().filter_map(|(plan, code)| Some((rank(code)?, *plan)));
    ranked.max_by_key(|(rank, _)| *rank).map(|(_, plan)| plan)
}

/// Index of the code to load for a plan: its cubin where the GPU is just the right one.
pub(crate) fn code_of(gpu: Capability, plan: &Plan, codes: &[CodeEntry]) -> usize {
    let fits = |index: &u32| codes.get(*index as usize).and_then(|c| Arch::parse(&c.target)).map(|a| (a.major, a.minor)) == Some(gpu);
    plan.cubin.filter(fits).unwrap_or(plan.code) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Body;

    fn code(target: &str, kind: CodeKind) -> CodeEntry {
        CodeEntry { target: target.into(), kind, segment: 1, features: vec![] }
    }

    fn plan(target: &str) -> Plan {
        Plan { name: "fused".into(), target: target.into(), code: 0, cubin: None, kernels: vec![], body: Body::default(), predicted_ns: 0.0 }
    }

    #[test]
    fn each_gpu_gets_the_code_closest_to_it() {
        let targets = ["sm_80", "sm_90a", "sm_90", "x86-64-v3", "sm_75", "sm_120f"];
        let plans = targets.map(plan);
        let codes = targets.map(|t| code(t, if t.starts_with("sm") { CodeKind::Ptx } else { CodeKind::SharedObject }));
        let all: Vec<_> = plans.iter().zip(&codes).collect();
        let pick = |gpu| best(gpu, &all).map(|p| p.target.as_str());
        assert_eq!(pick((9, 0)), Some("sm_90a"));
        assert_eq!(pick((8, 9)), Some("sm_80"));
        assert_eq!(pick((8, 0)), Some("sm_80"));
        assert_eq!(pick((10, 0)), Some("sm_90"));
        assert_eq!(pick((12, 1)), Some("sm_120f"));
        assert_eq!(pick((7, 5)), Some("sm_75"));
        assert_eq!(pick((7, 0)), None);
    }

    #[test]
    fn sass_stays_within_its_major_and_is_preferred_on_its_own_gpu() {
        let cubin = code("sm_80", CodeKind::Cubin);
        assert!(Arch::parse("sm_80").unwrap().runs_on((8, 6), cubin.kind));
        assert!(!Arch::parse("sm_80").unwrap().runs_on((9, 0), cubin.kind));
        let codes = [code("sm_90a", CodeKind::Ptx), code("sm_90a", CodeKind::Cubin)];
        let plan = Plan { cubin: Some(1), ..plan("sm_90a") };
        assert_eq!(code_of((9, 0), &plan, &codes), 1);
        assert_eq!(code_of((10, 0), &plan, &codes), 0);
        for bad in ["sm_", "sm_9", "sm_90x", "sm_abc", "compute_90", "sm_99999"] {
            assert_eq!(Arch::parse(bad), None, "{bad}");
        }
    }
}
