//! Threads take turns: one at a time runs guest code, so that nobody writes between the reference's run and the real one. First come,
//! first served, and nothing but two numbers, so that a fork finds it usable.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// The turn.
#[derive(Debug, Default)]
pub struct Turn {
    next: AtomicU32,
    serving: AtomicU32,
}

impl Turn {
    /// Waits for the turn.
    pub fn take(&self) {
        let mine = self.next.fetch_add(1, Ordering::SeqCst);
        let mut looks = 0;
        while self.serving.load(Ordering::Acquire) != mine {
            looks += 1;
            if looks < 64 {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    /// The next one's.
    pub fn give(&self) {
        self.serving.fetch_add(1, Ordering::Release);
    }

    /// Does anybody else wait? Asked by who has the turn.
    pub fn is_wanted(&self) -> bool {
        self.next.load(Ordering::Relaxed).wrapping_sub(self.serving.load(Ordering::Relaxed)) > 1
    }

    /// In a forked child, by who has the turn: those who waited are not here.
    pub fn alone(&self) {
        self.next.store(self.serving.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn one_at_a_time_and_everybody() {
        let (turn, inside) = (Turn::default(), AtomicBool::new(false));
        let counts = [const { AtomicU32::new(0) }; 3];
        std::thread::scope(|s| {
            for count in &counts {
                s.spawn(|| {
                    for _ in 0..200 {
                        turn.take();
                        assert!(!inside.swap(true, Ordering::SeqCst));
                        count.fetch_add(1, Ordering::Relaxed);
                        inside.store(false, Ordering::SeqCst);
                        turn.give();
                    }
                });
            }
        });
        assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 200));
        turn.take();
        assert!(!turn.is_wanted());
    }
}
