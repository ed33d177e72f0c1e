//! The null device: computes nothing, writes down what it was asked to do.
//!
//! It reads every scalar as 1: branches go the `then` way, loops go round once, sizes computed at
//! run time are 1. Outputs have the right shapes and are zero.
use crate::backend::{Backend, Block, Launch, LaunchShape};
use crate::plan::Plan;
use crate::tensor::Tensor;
use crate::value::Value;
use crate::{DType, Error};
use std::fmt::Write;

/// Addresses are a block's number and an offset of so many bits.
const OFFSET_BITS: u32 = 40;

pub(crate) struct Null {
    /// What each block is called; block 0 is nobody's.
    blocks: Vec<String>,
    arenas: usize,
    kernels: Vec<String>,
    log: Vec<String>,
    inputs: Vec<u64>,
    outputs: Vec<u64>,
}

impl Null {
    /// `inputs` and `outputs`: how many there are.
    pub(crate) fn new(plan: &Plan, constants: usize, inputs: usize, outputs: usize) -> Self {
        let mut null = Null {
            blocks: vec!["?".into()],
            arenas: 0,
            kernels: plan.kernels.iter().map(|k| k.name.clone()).collect(),
            log: Vec::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
        };
        for n in 0..constants {
            null.block(format!("const{n}"));
        }
        null.inputs = (0..inputs).map(|n| null.block(format!("in{n}"))).collect();
        null.outputs = (0..outputs).map(|n| null.block(format!("out{n}"))).collect();
        null
    }

    /// Where the n-th constant is said to be.
    pub(crate) fn constant(n: usize) -> u64 {
        (n as u64 + 1) << OFFSET_BITS
    }

    fn block(&mut self, name: String) -> u64 {
        self.blocks.push(name);
        (self.blocks.len() as u64 - 1) << OFFSET_BITS
    }

    fn place(&self, address: u64) -> String {
        let (block, offset) = (address >> OFFSET_BITS, address & ((1 << OFFSET_BITS) - 1));
        let name = self.blocks.get(block as usize).map_or("?", |b| b.as_str());
        if offset == 0 { name.into() } else { format!("{name}+{offset:#x}") }
    }
}

impl Backend for Null {
    fn name(&self) -> &str {
        "null"
    }

    fn alloc(&mut self, bytes: usize) -> Result<Block, Error> {
        let address = self.block(format!("arena{}", self.arenas));
        self.arenas += 1;
        self.log.push(format!("alloc {} {bytes}", self.place(address)));
        Ok(Block { address, bytes, _owner: Box::new(()) })
    }

    fn begin(&mut self, _parallel: bool) -> Result<(), Error> {
        Ok(())
    }

    fn input(&mut self, n: usize, _value: &Value) -> Result<u64, Error> {
        Ok(self.inputs[n])
    }

    fn output(&mut self, n: usize, dtype: DType, shape: &[i64], tensor: Option<&mut Tensor>) -> Result<u64, Error> {
        if let Some(tensor) = tensor {
            tensor.reset_i64(dtype, shape)?;
            tensor.bytes_mut().fill(0);
        }
        Ok(self.outputs[n])
    }

    fn launch(&mut self, launch: &Launch, args: &[u64]) -> Result<(), Error> {
        let args: Vec<String> = args.iter().map(|a| self.place(*a)).collect();
        let name = &self.kernels[launch.kernel.index()];
        let mut line = format!("launch {name} [{}]", args.join(" "));
        if !launch.dims.is_empty() {
            write!(line, " dims {:?}", launch.dims).ok();
        }
        match &launch.shape {
            LaunchShape::Cpu(c) => {
                write!(line, " extent {} grain {}", c.extent, c.grain).ok();
                if c.scratch > 0 {
                    write!(line, " scratch {}", c.scratch).ok();
                }
            }
            LaunchShape::Gpu(g) => {
                write!(line, " grid {:?}", g.grid).ok();
                for map in &g.maps {
                    write!(line, " map {:?}/{:?}+{}", map.dims, map.strides, map.byte_offset).ok();
                }
            }
        }
        self.log.push(line);
        Ok(())
    }

    fn copy(&mut self, from: u64, to: u64, bytes: usize) -> Result<(), Error> {
        self.log.push(format!("copy {} -> {} {bytes}", self.place(from), self.place(to)));
        Ok(())
    }

    fn read(&mut self, from: u64, into: &mut [u8]) -> Result<(), Error> {
        self.log.push(format!("read {} {}", self.place(from), into.len()));
        into.fill(0);
        if let Some(low) = into.first_mut() {
            *low = 1;
        }
        Ok(())
    }

    fn write(&mut self, to: u64, bytes: &[u8]) -> Result<(), Error> {
        self.log.push(format!("write {} {}", self.place(to), bytes.len()));
        Ok(())
    }

    fn finish(&mut self, _outputs: &mut [Tensor]) -> Result<(), Error> {
        Ok(())
    }

    fn abandon(&mut self) {}

    fn launch_timed(&mut self, launch: &Launch, args: &[u64]) -> Result<f64, Error> {
        self.launch(launch, args).map(|()| 0.0)
    }

    fn max_trips(&self) -> i64 {
        1
    }

    fn take_log(&mut self) -> Vec<String> {
        std::mem::take(&mut self.log)
    }
}
