//! What this CPU can do, and what a target needs.
use crate::plan::CodeEntry;

/// CPU features by LLVM's names and how to ask for them.
macro_rules! x86_features {
    ($($llvm:literal = $std:tt),* $(,)?) => {
        /// The features that can be asked for, in LLVM's names. Code compiled for a native CPU
        /// records those of them that it uses.
        pub const KNOWN_FEATURES: &[&str] = &[$($llvm),*];

        /// Whether this CPU has a feature, by LLVM's name; `None` for an unknown name.
        #[cfg(target_arch = "x86_64")]
        pub fn has_feature(name: &str) -> Option<bool> {
            match name { $($llvm => Some(std::arch::is_x86_feature_detected!($std)),)* _ => None }
        }

        /// Whether this CPU has a feature, by LLVM's name; `None` for an unknown name.
        #[cfg(not(target_arch = "x86_64"))]
        pub fn has_feature(name: &str) -> Option<bool> {
            KNOWN_FEATURES.contains(&name).then_some(false)
        }
    };
}

x86_features! {
    "sse3" = "sse3", "ssse3" = "ssse3", "sse4.1" = "sse4.1", "sse4.2" = "sse4.2",
    "popcnt" = "popcnt", "avx" = "avx", "avx2" = "avx2", "bmi" = "bmi1", "bmi2" = "bmi2",
    "f16c" = "f16c", "fma" = "fma", "lzcnt" = "lzcnt", "movbe" = "movbe", "xsave" = "xsave",
    "aes" = "aes", "pclmul" = "pclmulqdq", "sha" = "sha", "adx" = "adx", "gfni" = "gfni",
    "vaes" = "vaes", "vpclmulqdq" = "vpclmulqdq",
    "avx512f" = "avx512f", "avx512bw" = "avx512bw", "avx512cd" = "avx512cd",
    "avx512dq" = "avx512dq", "avx512vl" = "avx512vl", "avx512ifma" = "avx512ifma",
    "avx512vbmi" = "avx512vbmi", "avx512vbmi2" = "avx512vbmi2", "avx512vnni" = "avx512vnni",
    "avx512bitalg" = "avx512bitalg", "avx512vpopcntdq" = "avx512vpopcntdq",
    "avx512bf16" = "avx512bf16", "avx512fp16" = "avx512fp16", "avxvnni" = "avxvnni",
}

const V2: &[&str] = &["sse3", "ssse3", "sse4.1", "sse4.2", "popcnt"];
const V3: &[&str] = &["avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave"];
const V4: &[&str] = &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"];

/// How good a CPU target is, the higher the better; `None` for a target of another device.
/// A native target goes before any level.
pub(crate) fn level(target: &str) -> Option<usize> {
    match target {
        _ if target == "native" || target.starts_with("native:") => Some(5),
        "x86-64" => Some(1),
        "x86-64-v2" => Some(2),
        "x86-64-v3" => Some(3),
        "x86-64-v4" => Some(4),
        _ => None,
    }
}

/// The features that code needs and this CPU lacks.
pub(crate) fn missing(code: &CodeEntry) -> Vec<String> {
    // A native target lists all it needs.
    let n = level(&code.target).filter(|n| *n <= 4).unwrap_or(1);
    let implied = [V2, V3, V4].into_iter().take(n - 1).flatten().copied();
    let all = implied.chain(code.features.iter().map(String::as_str));
    let mut missing: Vec<String> = all.filter(|f| has_feature(f) != Some(true)).map(String::from).collect();
    if cfg!(not(target_arch = "x86_64")) {
        missing.insert(0, "x86-64".into());
    }
    missing
}

/// The best level of this CPU: `x86-64-v3`.
pub fn host_level() -> &'static str {
    let has = |list: &[&str]| list.iter().all(|f| has_feature(f) == Some(true));
    match (has(V2), has(V3), has(V4)) {
        (true, true, true) => "x86-64-v4",
        (true, true, false) => "x86-64-v3",
        (true, false, _) => "x86-64-v2",
        _ if cfg!(target_arch = "x86_64") => "x86-64",
        _ => std::env::consts::ARCH,
    }
}

pub(crate) fn describe_host() -> String {
    format!("runs {}", host_level())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::CodeKind;

    #[test]
    fn a_cpu_is_asked_for_each_feature_of_a_target() {
        let code = |target: &str, features: &[&str]| CodeEntry {
            target: target.into(),
            kind: CodeKind::SharedObject,
            segment: 1,
            features: features.iter().map(|f| f.to_string()).collect(),
        };
        assert!(missing(&code(host_level(), &[])).is_empty());
        assert_eq!(missing(&code("native:marsrover", &["wings"])), ["wings"]);
        assert_eq!(missing(&code("x86-64", &["sse4.2", "warp"])), ["warp"]);
        assert!(level("native:znver3") > level("x86-64-v4"));
        assert_eq!(level("sm_90a"), None);
        for f in KNOWN_FEATURES {
            assert!(has_feature(f).is_some());
        }
    }
}
