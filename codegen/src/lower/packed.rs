//! Elements narrower than a byte, in memory of a CPU: the first in the lowest bits.
use super::{LowerError, convert, cpu::Lowering};
use crate::tile::{Stmt, Ty};
use pavage_ir::{DType, Scalar};

impl Lowering<'_> {
    /// Elements from an index on, or at each index of a vector; masked or not. Registers hold a byte an element.
    pub(super) fn load_packed(&mut self, s: &Stmt, offset: i64, ty: Ty, each: bool) -> Result<String, LowerError> {
        let mask = s.args.get(1).map(|m| self.name(*m).to_owned());
        if !ty.is_scalar() && !each && mask.is_none() && ty.dtype().bits() == 4 && ty.lanes().is_multiple_of(2) {
            return Ok(self.load_nibbles(s, offset, ty));
        }
        let from = self.ty(s.args[0]);
        let start = self.name(s.args[0]).to_owned();
        let mut lanes = vec![];
        for l in 0..ty.lanes() {
            let mut at = start.clone();
            if !from.is_scalar() {
                at = self.e.op(&format!("vector.extract {at}[{l}] : {} from {}", self.e.ty(Ty::Scalar(from.dtype())), self.e.ty(from)));
            }
            if from.dtype() == DType::I32 {
                at = self.e.op(&format!("arith.extsi {at} : i32 to i64"));
            }
            let k = self.e.index(offset + if from.is_scalar() { l as i64 } else { 0 });
            let at = self.e.op(&format!("arith.addi {at}, {k} : i64"));
            let Some(mask) = &mask else {
                lanes.push(self.packed_element(s, &at, ty.dtype()));
                continue;
            };
            let allowed = if ty.is_scalar() { mask.clone() } else { self.e.op(&format!("vector.extract {mask}[{l}] : i1 from vector<{}xi1>", ty.lanes())) };
            let r = self.e.fresh();
            self.e.open(&format!("{r} = scf.if {allowed} -> (i8) {{"));
            let v = self.packed_element(s, &at, ty.dtype());
            self.e.line(&format!("scf.yield {v} : i8"));
            self.e.close("} else {");
            self.e.reopen();
            let zero = self.e.constant(Scalar::I(0), Ty::Scalar(DType::I8));
            self.e.line(&format!("scf.yield {zero} : i8"));
            self.e.close("}");
            lanes.push(r);
        }
        let v = if ty.is_scalar() { lanes.remove(0) } else { self.e.op(&format!("vector.from_elements {} : {}", lanes.join(", "), self.e.ty(ty))) };
        Ok(convert::wrap_packed(&mut self.e, &v, ty))
    }

    /// The byte of one element, moved so that the element's bits are the low ones.
    fn packed_element(&mut self, s: &Stmt, at: &str, dtype: DType) -> String {
        let per = 8 / dtype.bits() as i64;
        let [shift, within, bits] = [per.ilog2().into(), per - 1, dtype.bits() as i64].map(|k| self.e.index(k));
        let byte = self.e.op(&format!("arith.shrsi {at}, {shift} : i64"));
        let pointer = self.pointers[s.bufs[0].0 as usize].clone();
        let p = self.e.op(&format!("llvm.getelementptr {pointer}[{byte}] : (!llvm.ptr, i64) -> !llvm.ptr, i8"));
        let v = self.e.op(&format!("llvm.load {p} {{alignment = 1 : i64}} : !llvm.ptr -> i8"));
        let part = self.e.op(&format!("arith.andi {at}, {within} : i64"));
        let by = self.e.op(&format!("arith.muli {part}, {bits} : i64"));
        let by = self.e.op(&format!("arith.trunci {by} : i64 to i8"));
        self.e.op(&format!("arith.shrui {v}, {by} : i8"))
    }

    /// Consecutive nibbles from any index on. From an odd one, the bytes that hold the second of each pair are one further;
    /// from an even one both loads are the same. Neither touches a byte beyond the last element.
    fn load_nibbles(&mut self, s: &Stmt, offset: i64, ty: Ty) -> String {
        let half = Ty::of_lanes(DType::U8, ty.lanes() / 2);
        let t = self.e.ty(half);
        let pointer = self.pointers[s.bufs[0].0 as usize].clone();
        let (k, one) = (self.e.index(offset), self.e.index(1));
        let at = self.e.op(&format!("arith.addi {}, {k} : i64", self.name(s.args[0])));
        let next = self.e.op(&format!("arith.addi {at}, {one} : i64"));
        let bytes = |l: &mut Self, at: &str| {
            let byte = l.e.op(&format!("arith.shrsi {at}, {one} : i64"));
            let p = l.e.op(&format!("llvm.getelementptr {pointer}[{byte}] : (!llvm.ptr, i64) -> !llvm.ptr, i8"));
            l.e.op(&format!("llvm.load {p} {{alignment = 1 : i64}} : !llvm.ptr -> {t}"))
        };
        let (low, later) = (bytes(self, &at), bytes(self, &next));
        let four = self.e.constant(Scalar::I(4), half);
        let high = self.e.op(&format!("arith.shrui {low}, {four} : {t}"));
        let odd = self.e.op(&format!("arith.trunci {at} : i64 to i1"));
        let first = self.e.op(&format!("arith.select {odd}, {high}, {low} : {t}"));
        let second = self.e.op(&format!("arith.select {odd}, {later}, {high} : {t}"));
        let v = if half.is_scalar() {
            self.e.op(&format!("vector.from_elements {first}, {second} : vector<2xi8>"))
        } else {
            let n = half.lanes() as u16;
            let mask: Vec<u16> = (0..n).flat_map(|i| [i, n + i]).collect();
            self.shuffle(&first, &second, half, &mask)
        };
        convert::wrap_packed(&mut self.e, &v, ty)
    }

    /// Whole bytes of elements, unmasked, from an index that begins one.
    pub(super) fn store_packed(&mut self, s: &Stmt, offset: i64, ty: Ty) -> Result<(), LowerError> {
        let bits = ty.dtype().bits();
        let per = 8 / bits;
        if s.args.len() > 2 || !ty.lanes().is_multiple_of(per) {
            return Err(self.fail(&format!("masked or odd store of {ty}")));
        }
        let v = self.name(s.args[1]).to_owned();
        let whole = Ty::of_lanes(DType::U8, ty.lanes() / per);
        let t = self.e.ty(whole);
        let mask = self.e.constant(Scalar::I((1 << bits) - 1), whole);
        let mut bytes = String::new();
        for part in 0..per {
            let lanes: Vec<u16> = (0..whole.lanes()).map(|i| (per * i + part) as u16).collect();
            let low = self.shuffle(&v, &v, ty, &lanes);
            let low = self.e.op(&format!("arith.andi {low}, {mask} : {t}"));
            if part == 0 {
                bytes = low;
                continue;
            }
            let by = self.e.constant(Scalar::I((bits * part) as i128), whole);
            let up = self.e.op(&format!("arith.shli {low}, {by} : {t}"));
            bytes = self.e.op(&format!("arith.ori {bytes}, {up} : {t}"));
        }
        let p = self.address(s.bufs[0], s.args[0], offset);
        self.e.line(&format!("llvm.store {bytes}, {p} {{alignment = 1 : i64}} : {t}, !llvm.ptr"));
        Ok(())
    }
}
