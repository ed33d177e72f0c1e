//! `Pool`: threads that share one parallel region at a time.
//!
//! A region runs `kernel(bufs, dims, lo, hi)` on slices of `0..extent` that begin at multiples of
//! a grain. The caller takes part; a thread that is done with its own share takes from others, and
//! a worker that is late is never waited for: only chunks that somebody has claimed are. Workers
//! spin between regions, so that a region costs well under a microsecond, and sleep when none
//! comes for a while.
//!
//! How a region is published: the caller writes the description, then one word a thread with the
//! region's number and how many chunks are left, then the number. A claim compares and exchanges
//! that word, so a worker that wakes in a later region fails to claim from the earlier one, and the
//! description is read only by those who hold a chunk, which keeps the region open.
use crate::Error;
use std::cell::UnsafeCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::*};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A CPU kernel: buffers, sizes, slice.
pub(crate) type KernelFn = unsafe extern "C" fn(*const *mut u8, *const i64, i64, i64);

/// How long workers spin for the next region during a run.
const SPIN_IN_RUN: Duration = Duration::from_micros(500);
/// How long they do after it, for a run that follows at once.
const SPIN_AFTER_RUN: Duration = Duration::from_micros(50);
/// Work under this many picoseconds stays on one thread.
const SERIAL_PS: u64 = 6_000_000;
/// A thread more for each so many picoseconds.
const THREAD_PS: u64 = 3_000_000;
/// A thread's share above this is cut into chunks that others may take.
const CHUNKED_PS: u64 = 30_000_000;
const CHUNKS: u64 = 4;

/// Runs going on in this process: they divide the cores among them.
static RUNS: AtomicUsize = AtomicUsize::new(0);

/// One parallel piece of work.
#[derive(Clone, Copy)]
pub(crate) struct Region {
    pub(crate) kernel: KernelFn,
    /// Thread t's buffers begin at `bufs + t * stride`.
    pub(crate) bufs: *const *mut u8,
    pub(crate) stride: usize,
    pub(crate) dims: *const i64,
    pub(crate) extent: i64,
    pub(crate) grain: i64,
}

#[repr(align(128))]
struct Padded<T>(T);

struct Shared {
    region: UnsafeCell<Split>,
    number: Padded<AtomicU32>,
    width: AtomicUsize,
    done: Padded<AtomicU64>,
    /// For each thread: region number << 32 | next chunk << 16 | chunks.
    claims: Box<[Padded<AtomicU64>]>,
    /// For each thread: 1 while it sleeps, or is about to.
    asleep: Box<[Padded<AtomicU32>]>,
    in_run: AtomicBool,
    stop: AtomicBool,
    /// Workers that have started.
    started: AtomicUsize,
}

// SAFETY: `region` is written only between regions and read only by holders of a chunk; see the
// module's comment. All else is atomic.
unsafe impl Sync for Shared {}
// SAFETY: the pointers in `region` are used only while the caller of `Pool::run` waits.
unsafe impl Send for Shared {}

#[derive(Clone, Copy)]
struct Split {
    region: Region,
    /// Units of one grain in all.
    units: u64,
    width: u64,
    /// Chunks of each thread's share.
    chunks: u64,
}

/// The threads of a session.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    cores: usize,
}

/// A run going on; other runs get fewer threads meanwhile.
pub(crate) struct Running;

impl Drop for Running {
    fn drop(&mut self) {
        RUNS.fetch_sub(1, Relaxed);
    }
}

extern "C" fn nothing(_: *const *mut u8, _: *const i64, _: i64, _: i64) {}

/// How many threads a piece of work is worth; results never depend on it.
pub(crate) fn worth(extent: i64, grain: i64, unit_ps: i64) -> usize {
    // 0 stands for unknown: a microsecond a unit.
    let unit_ps = if unit_ps == 0 { 1_000_000 } else { unit_ps };
    let total = (extent as u64).saturating_mul(unit_ps as u64);
    if total < SERIAL_PS {
        return 1;
    }
    let units = (extent as u64).div_ceil(grain as u64);
    (total / THREAD_PS).min(units).min(1 << 16) as usize
}

impl Pool {
    /// A pool of so many threads, the caller's included.
    pub(crate) fn new(threads: usize) -> Result<Pool, Error> {
        let threads = threads.clamp(1, 1024);
        let idle = Region { kernel: nothing, bufs: std::ptr::null(), stride: 0, dims: std::ptr::null(), extent: 0, grain: 1 };
        let shared = Arc::new(Shared {
            region: UnsafeCell::new(Split { region: idle, units: 0, width: 1, chunks: 1 }),
            number: Padded(AtomicU32::new(0)),
            width: AtomicUsize::new(0),
            done: Padded(AtomicU64::new(0)),
            claims: (0..threads).map(|_| Padded(AtomicU64::new(0))).collect(),
            asleep: (0..threads).map(|_| Padded(AtomicU32::new(0))).collect(),
            in_run: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            started: AtomicUsize::new(0),
        });
        let mut workers = Vec::new();
        for id in 1..threads {
            let shared = shared.clone();
            let worker = std::thread::Builder::new()
                .name(format!("pavage-{id}"))
                .spawn(move || {
                    shared.started.fetch_add(1, Release);
                    shared.work(id)
                })
                .map_err(|e| Error::Device { device: "cpu".into(), what: "starting a thread".into(), why: e.to_string() })?;
            workers.push(worker);
        }
        // A thread allocates as it starts; a run should not see that.
        while shared.started.load(Acquire) < workers.len() {
            std::thread::yield_now();
        }
        let cores = std::thread::available_parallelism().map_or(threads, |n| n.get());
        Ok(Pool { shared, workers, cores })
    }

    /// All threads of the pool, the caller's included.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// A run begins; when it has parallel regions, workers wake while the first steps run.
    pub(crate) fn begin(&self, parallel: bool) -> Running {
        RUNS.fetch_add(1, Relaxed);
        self.shared.in_run.store(true, Relaxed);
        if parallel {
            self.shared.wake(self.width(self.threads()));
        }
        Running
    }

    /// The run is over; workers go to sleep soon.
    pub(crate) fn end(&self) {
        self.shared.in_run.store(false, Relaxed);
    }

    /// Threads for a region that wants so many: cores are shared among runs.
    fn width(&self, wanted: usize) -> usize {
        let share = (self.cores / RUNS.load(Relaxed).max(1)).max(1);
        let most = if self.threads() > self.cores { self.threads() } else { share };
        wanted.min(self.threads()).min(most)
    }

    /// Runs the kernel on all of `0..extent`. `unit_ps` is the predicted cost of a unit.
    ///
    /// # Safety
    /// The kernel may be called so, from several threads at once; there are buffers for as many
    /// threads as the pool has.
    pub(crate) unsafe fn run(&mut self, region: Region, unit_ps: i64) {
        if region.extent <= 0 {
            return;
        }
        let width = self.width(worth(region.extent, region.grain, unit_ps));
        if width <= 1 {
            // SAFETY: passed on to the caller.
            unsafe { (region.kernel)(region.bufs, region.dims, 0, region.extent) };
            return;
        }
        let units = (region.extent as u64).div_ceil(region.grain as u64);
        let share_ps = (unit_ps as u64).saturating_mul(region.extent as u64) / width as u64;
        let chunks = if share_ps > CHUNKED_PS { CHUNKS } else { 1 };
        let split = Split { region, units, width: width as u64, chunks };
        self.shared.publish(split);
        let number = self.shared.number.0.load(Relaxed);
        self.shared.wake(width);
        self.shared.take_part(0, number, width);
        let all = split.chunks * split.width;
        let mut waited = 0u32;
        while self.shared.done.0.load(Acquire) != all {
            waited += 1;
            // Whoever holds the last chunk may have lost its core.
            if waited > 20_000 { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        self.shared.number.0.fetch_add(1, SeqCst);
        self.shared.wake(self.threads());
        for worker in self.workers.drain(..) {
            worker.join().ok();
        }
    }
}

impl Split {
    /// The slice that is chunk `chunk` of thread `owner`.
    fn slice(&self, owner: u64, chunk: u64) -> (i64, i64) {
        let share = |t: u64| self.units * t / self.width;
        let (first, last) = (share(owner), share(owner + 1));
        let at = |c: u64| first + (last - first) * c / self.chunks;
        let grain = self.region.grain;
        let lo = at(chunk) as i64 * grain;
        (lo, (at(chunk + 1) as i64).saturating_mul(grain).min(self.region.extent))
    }
}

impl Shared {
    fn publish(&self, split: Split) {
        // SAFETY: the last region is over, so nobody reads this; see the module's comment.
        unsafe { *self.region.get() = split };
        let number = self.number.0.load(Relaxed).wrapping_add(1);
        self.done.0.store(0, Relaxed);
        for claim in &self.claims[..split.width as usize] {
            claim.0.store(u64::from(number) << 32 | split.chunks, Release);
        }
        self.width.store(split.width as usize, Relaxed);
        self.number.0.store(number, SeqCst);
    }

    /// Wakes sleepers among the first `width` threads.
    fn wake(&self, width: usize) {
        for asleep in &self.asleep[1..width.max(1)] {
            if asleep.0.load(SeqCst) == 1 && asleep.0.swap(0, SeqCst) == 1 {
                futex(&asleep.0, libc::FUTEX_WAKE, 1);
            }
        }
    }

    /// Claims chunks of region `number`, one's own first, until none is left.
    fn take_part(&self, me: usize, number: u32, width: usize) {
        for k in 0..width {
            let owner = (me + k) % width;
            while let Some(chunk) = self.claim(owner, number) {
                // SAFETY: whoever holds a chunk of the region keeps it open.
                let split = unsafe { *self.region.get() };
                let (lo, hi) = split.slice(owner as u64, chunk);
                if lo < hi {
                    let r = split.region;
                    // SAFETY: as the caller of `Pool::run` promises; `me` is below the width.
                    unsafe { (r.kernel)(r.bufs.add(me * r.stride), r.dims, lo, hi) };
                }
                self.done.0.fetch_add(1, Release);
            }
        }
    }

    fn claim(&self, owner: usize, number: u32) -> Option<u64> {
        let word = &self.claims[owner].0;
        let mut now = word.load(Acquire);
        loop {
            let (next, all) = (now >> 16 & 0xffff, now & 0xffff);
            if (now >> 32) as u32 != number || next >= all {
                return None;
            }
            match word.compare_exchange_weak(now, now + (1 << 16), AcqRel, Acquire) {
                Ok(_) => return Some(next),
                Err(found) => now = found,
            }
        }
    }

    /// What a worker does for its life.
    fn work(&self, me: usize) {
        let mut seen = 0;
        let mut since = Instant::now();
        let mut spins = 0u32;
        loop {
            let number = self.number.0.load(Acquire);
            if number != seen {
                if self.stop.load(SeqCst) {
                    return;
                }
                seen = number;
                let width = self.width.load(Relaxed);
                if me < width {
                    self.take_part(me, number, width);
                    since = Instant::now();
                }
                continue;
            }
            std::hint::spin_loop();
            spins = spins.wrapping_add(1);
            // A look at the clock costs about as much as one pause.
            if spins.is_multiple_of(32) {
                let patience = if self.in_run.load(Relaxed) { SPIN_IN_RUN } else { SPIN_AFTER_RUN };
                if since.elapsed() > patience {
                    self.sleep(me, seen);
                    since = Instant::now();
                }
            }
        }
    }

    fn sleep(&self, me: usize, seen: u32) {
        let asleep = &self.asleep[me].0;
        asleep.store(1, SeqCst);
        // A region published before the store above would find nobody to wake.
        if self.number.0.load(SeqCst) != seen {
            asleep.store(0, SeqCst);
            return;
        }
        while asleep.load(SeqCst) == 1 {
            futex(asleep, libc::FUTEX_WAIT, 1);
        }
    }
}

fn futex(word: &AtomicU32, what: i32, value: u32) {
    // SAFETY: the word outlives the call; a wait without timeout or a wake has no other argument.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), what | libc::FUTEX_PRIVATE_FLAG, value, std::ptr::null::<libc::timespec>());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Adds 1 to each element of the slice, and counts calls in buffer 1.
    unsafe extern "C" fn bump(bufs: *const *mut u8, _: *const i64, lo: i64, hi: i64) {
        // SAFETY: the tests below pass an array of i64 of the extent's length and a counter.
        unsafe {
            let counts = (*bufs).cast::<i64>();
            for i in lo..hi {
                *counts.add(i as usize) += 1;
            }
            let calls = &*(*bufs.add(1)).cast::<AtomicU64>();
            calls.fetch_add(1, Relaxed);
        }
    }

    fn check(pool: &mut Pool, extent: i64, grain: i64, unit_ps: i64) -> u64 {
        let mut counts = vec![0i64; extent as usize];
        let calls = AtomicU64::new(0);
        let bufs = [counts.as_mut_ptr().cast::<u8>(), calls.as_ptr().cast::<u8>()];
        let region = Region { kernel: bump, bufs: bufs.as_ptr(), stride: 0, dims: std::ptr::null(), extent, grain };
        // SAFETY: `bump` gets what it needs, and slices do not overlap.
        unsafe { pool.run(region, unit_ps) };
        assert!(counts.iter().all(|c| *c == 1), "{extent} by {grain}: {counts:?}");
        calls.into_inner()
    }

    #[test]
    fn every_unit_runs_once_whatever_the_threads_and_the_grain() {
        for threads in [1, 2, 3, 7] {
            let mut pool = Pool::new(threads).unwrap();
            for (extent, grain) in [(0, 1), (1, 1), (2, 1), (17, 4), (100, 7), (1000, 1), (5, 100)] {
                for unit_ps in [1, 1_000_000, 900_000_000] {
                    check(&mut pool, extent, grain, unit_ps);
                }
            }
        }
    }

    #[test]
    fn small_work_stays_on_one_thread() {
        let mut pool = Pool::new(4).unwrap();
        assert_eq!(check(&mut pool, 100, 1, 10), 1);
        assert_eq!(worth(1, 1, i64::MAX), 1);
        assert_eq!(worth(1000, 500, 1_000_000), 2);
    }

    #[test]
    fn many_regions_in_a_row_and_after_sleep() {
        let mut pool = Pool::new(3).unwrap();
        for round in 0..3000 {
            check(&mut pool, 1 + round % 40, 1 + round % 3, 5_000_000);
            if round % 500 == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }

    #[test]
    fn pools_side_by_side_do_not_disturb_each_other() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut pool = Pool::new(3).unwrap();
                    for round in 0..500 {
                        let running = pool.begin(true);
                        check(&mut pool, 1 + round % 90, 1, 4_000_000);
                        drop(running);
                        pool.end();
                    }
                });
            }
        });
    }
}
