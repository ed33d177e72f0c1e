//! Regions to code: the tile IR, kernel families, and the lowerings to CPU objects and PTX.
pub mod tile;
