//! The machine's time: the host's, or one that is counted from instructions and is the same in every run.

use crate::bus::Ns;
use crate::host::clock::tsc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// What each look at the clock adds to counted time, so that a guest that waits for it goes on.
const LOOK: Ns = 100;

/// Nanoseconds since the machine was made, and the processor's time-stamp counter.
#[derive(Debug)]
pub enum Clock {
    /// The host's clock and counter.
    Host {
        /// When the machine was made.
        start: Instant,
        /// The host's counter then.
        tsc: u64,
    },
    /// Moved by [`Clock::add`] and a little by each look. The counter runs at 1 GHz.
    Counted(AtomicU64),
}

impl Clock {
    /// The host's, from now on.
    pub fn host() -> Clock {
        Clock::Host { start: Instant::now(), tsc: tsc() }
    }

    /// Counted, from 0.
    pub fn counted() -> Clock {
        Clock::Counted(AtomicU64::new(0))
    }

    /// Is the time counted?
    pub fn is_counted(&self) -> bool {
        matches!(self, Clock::Counted(_))
    }

    /// The time, as a guest's access sees it.
    pub fn now(&self) -> Ns {
        match self {
            Clock::Host { start, .. } => start.elapsed().as_nanos() as Ns,
            Clock::Counted(t) => t.fetch_add(LOOK, Ordering::Relaxed) + LOOK,
        }
    }

    /// Moves counted time on.
    pub fn add(&self, by: Ns) {
        if let Clock::Counted(t) = self {
            t.fetch_add(by, Ordering::Relaxed);
        }
    }

    /// The time-stamp counter, where it is not the host's.
    pub fn counter(&self) -> Option<u64> {
        self.is_counted().then(|| self.now())
    }

    /// When the time-stamp counter (the host's, or ours) reaches `deadline`; 0 if it has, whatever the time was at which somebody looked.
    pub fn when(&self, deadline: u64) -> Ns {
        match self {
            Clock::Host { start, tsc: base } => {
                let (ticks, ns) = (tsc().wrapping_sub(*base), start.elapsed().as_nanos());
                let left = deadline.wrapping_sub(base.wrapping_add(ticks)) as i64;
                if left <= 0 {
                    return 0;
                }
                // The rate is what was measured since the start; far deadlines saturate.
                let wait = (left as u128).saturating_mul(ns.max(1)) / u128::from(ticks.max(1));
                ns.saturating_add(wait).min(u128::from(u64::MAX / 2)) as Ns
            }
            Clock::Counted(_) => deadline,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counted_time_moves_only_when_told_or_looked_at() {
        let c = Clock::counted();
        assert_eq!((c.now(), c.now()), (LOOK, 2 * LOOK));
        c.add(1000);
        assert_eq!(c.counter(), Some(1000 + 3 * LOOK));
        assert_eq!(c.when(77), 77);
    }

    #[test]
    fn deadlines_of_the_counter_in_host_time() {
        let c = Clock::host();
        std::thread::sleep(std::time::Duration::from_millis(20));
        let (now, counter) = (c.now(), tsc());
        let Clock::Host { tsc: base, .. } = c else { unreachable!("made so") };
        // As long again as has passed so far.
        let at = c.when(counter + (counter - base));
        assert!((now * 19 / 10..now * 22 / 10).contains(&at), "{at} for {now}");
        assert_eq!(c.when(counter - 1), 0, "in the past");
    }
}
