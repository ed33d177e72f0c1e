//! Places buffers in one arena so that no two that live at once overlap.

/// Places begin at multiples of this.
pub(crate) const ARENA_ALIGN: usize = 256;

/// A buffer that needs a place from step `first` to step `last`, both included.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) bytes: usize,
    pub(crate) first: usize,
    pub(crate) last: usize,
}

/// Offsets in order of the requests.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) offsets: Vec<usize>,
    pub(crate) bytes: usize,
}

/// Greedy by size: the largest first, each at the lowest offset that is free while it lives.
/// `None` when the arena would pass the address space.
pub(crate) fn place(requests: &[Request]) -> Option<Layout> {
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(requests[i].bytes), requests[i].first, i));
    let mut layout = Layout { offsets: vec![0; requests.len()], bytes: 0 };
    // Those placed, by offset.
    let mut placed: Vec<usize> = Vec::with_capacity(requests.len());
    for i in order {
        let request = requests[i];
        let size = request.bytes.checked_next_multiple_of(ARENA_ALIGN)?;
        let mut at = 0usize;
        for &other in &placed {
            let o = requests[other];
            if o.first > request.last || request.first > o.last {
                continue;
            }
            if layout.offsets[other] >= at && layout.offsets[other] - at >= size {
                break;
            }
            at = at.max(layout.offsets[other] + o.bytes.next_multiple_of(ARENA_ALIGN));
        }
        let end = at.checked_add(size).filter(|end| isize::try_from(*end).is_ok())?;
        layout.offsets[i] = at;
        layout.bytes = layout.bytes.max(end);
        let where_to = placed.partition_point(|&p| layout.offsets[p] <= at);
        placed.insert(where_to, i);
    }
    Some(layout)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn buffers_that_live_at_once_never_overlap() {
        let mut random = Random::new(7);
        for round in 0..300 {
            let n = random.below(60) as usize;
            let requests: Vec<Request> = (0..n)
                .map(|_| {
                    let first = random.below(40) as usize;
                    let last = first + random.below(1 + random.state % 12) as usize;
                    Request { bytes: random.below(5000) as usize, first, last }
                })
                .collect();
            let layout = place(&requests).unwrap();
            let mut busiest = 0;
            for step in 0..60 {
                let live = requests.iter().filter(|r| r.first <= step && step <= r.last);
                let sum: usize = live.map(|r| r.bytes.next_multiple_of(ARENA_ALIGN)).sum();
                busiest = busiest.max(sum);
            }
            assert!(layout.bytes >= busiest, "round {round}");
            assert!(layout.bytes <= 2 * busiest + ARENA_ALIGN, "round {round}: wasteful");
            for (i, a) in requests.iter().enumerate() {
                assert_eq!(layout.offsets[i] % ARENA_ALIGN, 0);
                assert!(layout.offsets[i] + a.bytes <= layout.bytes);
                for (j, b) in requests.iter().enumerate().skip(i + 1) {
                    let meet = a.first <= b.last && b.first <= a.last;
                    let (at, bt) = (layout.offsets[i], layout.offsets[j]);
                    let apart = at + a.bytes <= bt || bt + b.bytes <= at;
                    assert!(!meet || apart, "round {round}: {i} and {j} overlap");
                }
            }
        }
    }

    #[test]
    fn a_chain_needs_two_places() {
        let chain: Vec<Request> = (0..50).map(|i| Request { bytes: 1024, first: i, last: i + 1 }).collect();
        assert_eq!(place(&chain).unwrap().bytes, 2048);
        let huge = [Request { bytes: usize::MAX - 8, first: 0, last: 0 }];
        assert!(place(&huge).is_none());
    }
}
