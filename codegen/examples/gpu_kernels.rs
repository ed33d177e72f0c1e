//! Write the Hopper kernels, and products by `mma.sync`, as PTX, with a description that `scripts/gpu/check_hopper.py` runs them by.
//!
//! usage: gpu_kernels FOLDER
use pavage_codegen::compile;
use pavage_codegen::kernels::flash::{self, Attention, FlashTiles};
use pavage_codegen::kernels::hopper_gemm::{self, Rhs, Tiles};
use pavage_codegen::kernels::hopper_samples::{self, Tail};
use pavage_codegen::kernels::{self, ArgFacts};
use pavage_codegen::targets::Target;
use pavage_codegen::tile::Kernel;
use pavage_ir::{DType, Schedule};
use std::fmt::Write as _;

struct Case {
    kernel: Kernel,
    /// What its PTX is for.
    arch: &'static str,
    /// Fields of the description beyond those that follow from the kernel, as JSON.
    fields: String,
}

fn gemm(name: &str, dtype: DType, out: DType, rhs: Rhs, tiles: Tiles, batched: bool) -> Case {
    let check = if batched {
        "[[128,256,64,3],[300,264,136,5]]"
    } else {
        "[[128,256,64,1],[256,256,512,1],[1000,776,200,1],[2048,2048,2048,1],[130,1032,4096,1],[8,512,1024,1]]"
    };
    let time = if batched {
        "[[512,512,64,192],[1024,1024,1024,16]]"
    } else {
        "[[1024,1024,1024,1],[2048,2048,2048,1],[4096,4096,4096,1],[8192,8192,8192,1],[4096,3072,768,1]]"
    };
    let params = if batched { "[\"m\", \"n\", \"k\", \"l\"]" } else { "[\"m\", \"n\", \"k\"]" };
    let rhs_name = if rhs == Rhs::Kn { "kn" } else { "nk" };
    let fields = format!(
        "\"kind\": \"gemm\", \"dtype\": \"{dtype}\", \"out\": \"{out}\", \"rhs\": \"{rhs_name}\", \"cluster\": {}, \"batched\": {batched}, \"epilogue\": \"none\", \"params\": {params}, \"check\": {check}, \"time\": {time}",
        tiles.cluster
    );
    Case { kernel: hopper_gemm::plain(name, dtype, out, rhs, tiles, batched), arch: HOPPER, fields }
}

const HOPPER: &str = "sm_90a";
const AMPERE: &str = "sm_80";

/// A fused linear layer, through the region it is in a model.
fn linear(name: &str, dtype: DType, n: i64, k: i64, tail: Tail) -> Result<Case, kernels::KernelError> {
    layer(name, dtype, [n, k], tail, HOPPER, None)
}

/// The same by `mma.sync`, as compiled for sm_80, with a tile `bm` x `bn` of warps' `wm` x `wn` and a ring of `stages` times `bk`.
fn mma(name: &str, dtype: DType, size: [i64; 2], tail: Tail, [bm, bn, wm, wn, bk, stages, ctas]: [i64; 7]) -> Result<Case, kernels::KernelError> {
    let knobs = [("bm", bm), ("bn", bn), ("wm", wm), ("wn", wn), ("bk", bk), ("stages", stages), ("ctas", ctas), ("group", 8)];
    layer(name, dtype, size, tail, AMPERE, Some(Schedule::new("gemm_mma", &knobs)))
}

fn layer(name: &str, dtype: DType, [n, k]: [i64; 2], tail: Tail, arch: &'static str, schedule: Option<Schedule>) -> Result<Case, kernels::KernelError> {
    let target = Target::parse(arch).map_err(|e| kernels::KernelError::Unsupported { family: "hopper_gemm", reason: e.to_string() })?;
    let built = kernels::build(&hopper_samples::linear(dtype, dtype, n, k, tail), &target, name, &ArgFacts::default(), schedule.as_ref())?;
    let epilogue = match tail {
        Tail::None => "none",
        Tail::BiasGelu => "bias_gelu",
        Tail::BiasGeluAdd => "bias_gelu_add",
    };
    let tile = match built.schedule.family.as_str() {
        "gemm_gpu" => format!(" \"tile\": [{}, {}],", 64 * built.schedule.knob("rows", 1), 64 * built.schedule.knob("cols", 1)),
        "gemm_mma" => format!(" \"tile\": [{}, {}],", built.schedule.knob("bm", 1), built.schedule.knob("bn", 1)),
        _ => String::new(),
    };
    let shapes = |ms: &[i64]| format!("[{}]", ms.iter().map(|m| format!("[{m},{n},{k},1]")).collect::<Vec<_>>().join(","));
    let fields = format!(
        "\"kind\": \"gemm\", \"dtype\": \"{dtype}\", \"out\": \"{dtype}\", \"rhs\": \"kn\", \"cluster\": {}, \"batched\": false, \"epilogue\": \"{epilogue}\", \"params\": [\"m\"],{tile} \"schedule\": \"{}\", \"check\": {}, \"time\": {}",
        built.kernel.launch.cluster[0],
        built.schedule,
        shapes(&[128, 1000, 77, 4096]),
        shapes(&[4096, 8192])
    );
    Ok(Case { kernel: built.kernel, arch, fields })
}

fn attention(name: &str, dtype: DType, depth: u64, causal: bool, tiles: FlashTiles) -> Case {
    let att = Attention { depth, scale: 1.0 / (depth as f64).sqrt(), causal };
    let fields = format!(
        "\"kind\": \"flash\", \"dtype\": \"{dtype}\", \"d\": {depth}, \"causal\": {causal}, \"bm\": {}, \"check\": [[1,2,128,0],[1,3,384,0],[2,3,1000,0],[1,2,4096,0],[1,2,2000,1],[1,1,77,0]], \"time\": [[2,16,8192,0],[8,16,2048,0],[32,12,384,0]]",
        tiles.queries()
    );
    Case { kernel: flash::plain(name, dtype, att, tiles), arch: HOPPER, fields }
}

fn cases() -> Result<Vec<Case>, kernels::KernelError> {
    let big = Tiles { bn: 256, stages: 3, cluster: 2, group: 8 };
    let single = Tiles { cluster: 1, ..big };
    let narrow = Tiles { bn: 128, stages: 5, cluster: 2, group: 8 };
    Ok(vec![
        gemm("gemm_bf16_nk", DType::BF16, DType::BF16, Rhs::Nk, big, false),
        gemm("gemm_bf16_kn", DType::BF16, DType::BF16, Rhs::Kn, big, false),
        gemm("gemm_f16_kn", DType::F16, DType::F16, Rhs::Kn, big, false),
        gemm("gemm_bf16_kn_single", DType::BF16, DType::BF16, Rhs::Kn, single, false),
        gemm("gemm_bf16_kn_narrow", DType::BF16, DType::BF16, Rhs::Kn, narrow, false),
        gemm("gemm_bf16_kn_f32", DType::BF16, DType::F32, Rhs::Kn, big, false),
        gemm("gemm_f16_kn_batched", DType::F16, DType::F16, Rhs::Kn, narrow, true),
        attention("flash_bf16_d128", DType::BF16, 128, false, FlashTiles::best(128, false)),
        attention("flash_bf16_d128_turns", DType::BF16, 128, false, FlashTiles { pingpong: true, ..FlashTiles::best(128, false) }),
        attention("flash_f16_d64", DType::F16, 64, false, FlashTiles::best(64, false)),
        attention("flash_f16_d64_free", DType::F16, 64, false, FlashTiles { pingpong: false, ..FlashTiles::best(64, false) }),
        attention("flash_bf16_d128_causal", DType::BF16, 128, true, FlashTiles::best(128, true)),
        attention("flash_f16_d64_causal", DType::F16, 64, true, FlashTiles::best(64, true)),
        linear("linear_f32", DType::F32, 3072, 768, Tail::None)?,
        linear("linear_f32_gelu_odd", DType::F32, 770, 770, Tail::BiasGelu)?,
        linear("linear_f16", DType::F16, 3072, 768, Tail::None)?,
        linear("linear_f16_gelu", DType::F16, 3072, 768, Tail::BiasGelu)?,
        linear("linear_bf16_gelu_add", DType::BF16, 4096, 16384, Tail::BiasGeluAdd)?,
        mma("mma_bf16_256", DType::BF16, [4096, 4096], Tail::None, [128, 256, 64, 64, 32, 4, 1])?,
        mma("mma_bf16_256_deep", DType::BF16, [4096, 4096], Tail::None, [128, 256, 64, 64, 64, 3, 1])?,
        mma("mma_bf16_128", DType::BF16, [4096, 4096], Tail::None, [128, 128, 64, 64, 32, 4, 2])?,
        mma("mma_bf16_128_deep", DType::BF16, [4096, 4096], Tail::None, [128, 128, 64, 64, 64, 3, 2])?,
        mma("mma_f16_8192", DType::F16, [8192, 8192], Tail::None, [128, 256, 64, 64, 32, 4, 1])?,
        mma("mma_f16_gelu", DType::F16, [3072, 768], Tail::BiasGelu, [128, 128, 64, 64, 32, 4, 2])?,
        mma("mma_f16_odd", DType::F16, [770, 770], Tail::BiasGelu, [64, 64, 32, 32, 32, 4, 3])?,
    ])
}

fn describe(case: &Case) -> String {
    let k = &case.kernel;
    let list = |items: Vec<String>| format!("[{}]", items.join(", "));
    let maps = k
        .maps
        .iter()
        .map(|m| {
            let arg = k.args().position(|a| a == m.arg).unwrap_or(0);
            let text = |d: &[pavage_ir::Dim]| list(d.iter().map(|d| format!("\"{d}\"")).collect());
            format!(
                "{{\"arg\": {arg}, \"offset\": \"{}\", \"dims\": {}, \"strides\": {}, \"box\": {:?}, \"swizzle\": {}}}",
                m.offset,
                text(&m.dims),
                text(&m.strides),
                m.boxes,
                m.swizzle
            )
        })
        .collect();
    format!(
        "{{\"name\": \"{}\", \"ptx\": \"{}.ptx\", \"threads\": {}, \"smem\": {}, \"maps\": {}, {}}}",
        k.name,
        k.name,
        k.launch.threads,
        k.shared_bytes(),
        list(maps),
        case.fields
    )
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::args().nth(1).ok_or("usage: gpu_kernels FOLDER")?;
    std::fs::create_dir_all(&folder)?;
    let mut text = String::from("[\n");
    let cases = cases()?;
    for (i, case) in cases.iter().enumerate() {
        let ptx = compile::ptx(std::slice::from_ref(&case.kernel), &Target::parse(case.arch)?)?;
        std::fs::write(format!("{folder}/{}.ptx", case.kernel.name), ptx)?;
        writeln!(text, "  {}{}", describe(case), if i + 1 < cases.len() { "," } else { "" })?;
    }
    text.push_str("]\n");
    std::fs::write(format!("{folder}/kernels.json"), text)?;
    Ok(())
}
