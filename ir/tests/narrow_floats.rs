//! Floats of at most 8 bits against ml_dtypes: every code, and every rounding boundary (`scripts/narrow_floats.py`).
use pavage_ir::{DType, Scalar, Tensor, minifloat, tensor};

#[test]
fn codes_and_rounding_are_those_of_ml_dtypes() {
    let golden = include_str!("golden/narrow_floats.txt");
    let mut dtypes = 0;
    for line in golden.lines() {
        let (name, words) = line.split_once(' ').unwrap();
        let dtype: DType = name.parse().unwrap();
        let float = |bits: &str| f64::from(f32::from_bits(u32::from_str_radix(bits, 16).unwrap()));
        let mut checked = 0;
        for word in words.split(' ') {
            if let Some((code, bits)) = word.split_once('=') {
                let code = u8::from_str_radix(code, 16).unwrap();
                let got = minifloat::decode(code, dtype);
                if bits == "nan" {
                    assert!(got.is_nan(), "{dtype} {code:02x} is {got}");
                    assert!(minifloat::decode(minifloat::encode(got, dtype), dtype).is_nan());
                } else {
                    assert_eq!(got.to_bits(), float(bits).to_bits(), "{dtype} {code:02x} is {got}");
                    assert_eq!(minifloat::encode(got, dtype), code, "{dtype}: {got} and back");
                }
            } else {
                let (bits, code) = word.split_once('>').unwrap();
                let got = minifloat::encode(float(bits), dtype);
                if code == "nan" {
                    assert!(minifloat::decode(got, dtype).is_nan(), "{dtype} of {} is {got:02x}, not NaN", float(bits));
                } else {
                    assert_eq!(got, u8::from_str_radix(code, 16).unwrap(), "{dtype} of {} is {got:02x}", float(bits));
                }
            }
            checked += 1;
        }
        assert!(checked > 60, "{dtype}: {checked}");
        dtypes += 1;
    }
    assert_eq!(dtypes, DType::ALL.iter().filter(|d| d.is_mini()).count());
}

#[test]
fn packed_elements_stand_lowest_bits_first_and_keep_their_neighbours() {
    for dtype in DType::ALL.iter().copied().filter(|d| d.is_packed()) {
        let n = 1 << dtype.bits();
        let codes: Vec<u8> = (0..n).map(|c| (c * 7 + 3) as u8 & (n - 1) as u8).collect();
        let mut bytes = vec![0xff; dtype.bytes(codes.len())];
        for (i, c) in codes.iter().enumerate() {
            minifloat::pack(&mut bytes, dtype, i, *c);
        }
        assert!((0..codes.len()).all(|i| minifloat::packed(&bytes, dtype, i) == codes[i]), "{dtype}");
        let t = Tensor::new(dtype, [codes.len()], bytes).unwrap();
        let again = Tensor::from_scalars(dtype, [codes.len()], (0..codes.len()).map(|i| t.get(i)));
        assert!(t.same_bits(&again), "{dtype}");
    }
    let four = Tensor::new(DType::I2, [4], vec![0b11_10_01_00]).unwrap();
    assert_eq!(four.to_i64(), [0, 1, -2, -1]);
    assert_eq!(tensor::reinterpret(Scalar::I(-2), DType::I2, DType::U2), Scalar::I(2));
}

#[test]
fn integers_of_less_than_a_byte_wrap() {
    use pavage_ir::ScalarFn::*;
    for dtype in [DType::I4, DType::U4, DType::I2, DType::U2] {
        let (lo, hi) = dtype.int_range();
        for (a, b) in (lo..=hi).flat_map(|a| (lo..=hi).map(move |b| (a, b))) {
            for (f, exact) in [(Add, a + b), (Sub, a - b), (Mul, a * b), (Neg, -a), (Max, a.max(b)), (Min, a.min(b))] {
                let n = 1i128 << dtype.bits();
                let mut want = exact.rem_euclid(n);
                want = if want > hi { want - n } else { want };
                let args = [Scalar::I(a), Scalar::I(b)];
                assert_eq!(f.eval(dtype, &args[..f.arity()]), Scalar::I(want), "{f} of {a} and {b} in {dtype}");
            }
        }
    }
}
