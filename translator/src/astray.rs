//! Indirect branches that go astray. Where branches add up their target (see [`crate::lower::adds_up`]), one that its table entry did not
//! foresee arrives where nothing is executable, faults, and is sent on to the way out for missed targets.
//!
//! That costs a signal, so there may be so many in a time; entries that could cause more lead to a comparison meanwhile.

use crate::lower::MISS_AT;
use bivisor_emulator::host::code_space::PERIOD;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// How many have gone astray in this process.
static ALL: AtomicU64 = AtomicU64::new(0);

/// The exceptions that it can be (SDM 3A table 6-1), and the bit of #PF's error code for an instruction fetch (SDM 3A 4.7).
const GP: u64 = 13;
const PF: u64 = 14;
const FETCH: u64 = 1 << 4;

/// An exception of a thread that executes code from a cache.
pub struct Caught {
    /// Host address.
    pub pc: u64,
    /// The host's register, through which these branches jump.
    pub r11: u64,
    /// Number of the exception.
    pub trap: u64,
    /// Its error code.
    pub error: u64,
    /// Addresses of the cache: first, end.
    pub cache: (u64, u64),
}

impl Caught {
    /// If it is a branch that went astray: where the thread is to go on. `jumps`: is JMP R11 at this address in the cache?
    pub fn on(&self, jumps: impl Fn(u64) -> bool) -> Option<u64> {
        let (start, end) = self.cache;
        let len = end - start;
        let distance = self.r11.wrapping_sub(start);
        // What is added is a multiple of the period.
        if distance < len || distance % PERIOD >= len {
            return None;
        }
        // A target that is not canonical faults at the jump, others behind it.
        let fetched = self.pc == self.r11 && self.trap == PF && self.error & FETCH != 0;
        let jumped = self.trap == GP && (start..end).contains(&self.pc) && jumps(self.pc);
        (fetched || jumped).then(|| {
            ALL.fetch_add(1, Ordering::Relaxed);
            start + MISS_AT as u64
        })
    }
}

/// How many may be: some when a program starts, then so many that they cost about a hundredth of the time.
pub struct Budget {
    began: Instant,
    allowed: u64,
    /// Table entries that wait.
    pub waiting: Vec<u16>,
}

/// With a fault, a signal and the way out and in again at about 5 us each.
const AT_FIRST: u64 = 64;
const PER_MILLISECOND: u64 = 2;

impl Budget {
    /// From now on.
    pub fn new() -> Budget {
        Budget { began: Instant::now(), allowed: ALL.load(Ordering::Relaxed) + AT_FIRST, waiting: Vec::new() }
    }

    /// May there be another one?
    pub fn may_be_more(&mut self) -> bool {
        let all = ALL.load(Ordering::Relaxed);
        all < self.allowed || self.allows(all, Instant::now())
    }

    /// After so many, at this time.
    fn allows(&mut self, all: u64, now: Instant) -> bool {
        let time = now.saturating_duration_since(self.began).as_millis() as u64;
        if all >= self.allowed && time > 0 {
            // A time without any is not saved up for ever.
            self.allowed = all + (PER_MILLISECOND * time).min(AT_FIRST);
            self.began = now;
        }
        all < self.allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const CACHE: (u64, u64) = (0x7f00_1230_0000, 0x7f00_1430_0000);

    fn caught(pc: u64, r11: u64, trap: u64, error: u64) -> Option<u64> {
        Caught { pc, r11, trap, error, cache: CACHE }.on(|pc| pc == CACHE.0 + 0x500)
    }

    #[test]
    fn a_branch_astray_goes_on_at_the_way_out() {
        let out = Some(CACHE.0 + MISS_AT as u64);
        for times in [1u64, 2, 0xffff, 1 << 31, (1u64 << 32).wrapping_neg(), 1u64.wrapping_neg()] {
            let r11 = (CACHE.0 + 0x1234).wrapping_add(times.wrapping_mul(PERIOD));
            assert_eq!(caught(r11, r11, PF, FETCH | 4), out, "{times:#x}");
            assert_eq!(caught(CACHE.0 + 0x500, r11, GP, 0), out, "{times:#x}");
        }
    }

    #[test]
    fn other_exceptions_are_none_of_its_business() {
        let inside = CACHE.0 + 0x1234;
        let astray = inside + 3 * PERIOD;
        assert_eq!(caught(inside, inside, PF, FETCH), None, "in the cache");
        assert_eq!(caught(astray, astray, PF, 4), None, "a read");
        assert_eq!(caught(astray, astray, 6, 0), None, "#UD");
        assert_eq!(caught(astray + 1, astray, PF, FETCH), None, "elsewhere");
        assert_eq!(caught(CACHE.0 + 0x501, astray, GP, 0), None, "another instruction");
        let behind = CACHE.1 + 3 * PERIOD;
        assert_eq!(caught(behind, behind, PF, FETCH), None, "no address of code modulo the period");
    }

    #[test]
    fn a_budget_that_is_used_up_grows_with_time() {
        let began = Instant::now();
        let after = |ms| began + Duration::from_millis(ms);
        let mut budget = Budget { began, allowed: 64, waiting: Vec::new() };
        assert!(budget.allows(63, began));
        assert!(!budget.allows(64, began));
        assert!(budget.allows(64, after(3)));
        assert_eq!(budget.allowed, 70);
        assert!(!budget.allows(70, after(3)));
        assert!(budget.allows(70, after(100_000)));
        assert_eq!(budget.allowed, 70 + AT_FIRST, "a long time counts no more than a start");
    }
}
