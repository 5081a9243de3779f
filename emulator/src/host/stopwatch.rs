//! What leaving the guest costs, by class of reason: host time between an engine's way out and its way back in, only where somebody asked.

use std::time::{Duration, Instant};

/// One class of reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Which.
    pub class: &'static str,
    /// How often.
    pub times: u64,
    /// Host time of all of them together.
    pub time: Duration,
}

/// Adds up. Off until [`Stopwatch::start`], and then a test of a flag.
#[derive(Debug, Default)]
pub struct Stopwatch {
    on: bool,
    since: Option<(Instant, &'static str)>,
    costs: Vec<Cost>,
}

impl Stopwatch {
    /// From now on it counts.
    pub fn start(&mut self) {
        self.on = true;
    }

    /// Does it count?
    #[inline(always)]
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// The guest was left, for a reason of this class.
    #[inline]
    pub fn out(&mut self, class: impl FnOnce() -> &'static str) {
        if self.on {
            self.since = Some((Instant::now(), class()));
        }
    }

    /// Back into the guest, or to somebody who lets it wait: what was begun by [`Stopwatch::out`] ends.
    #[inline]
    pub fn back(&mut self) {
        if self.on
            && let Some((since, class)) = self.since.take()
        {
            self.add(class, since.elapsed());
        }
    }

    /// Once more, so long.
    pub fn add(&mut self, class: &'static str, time: Duration) {
        let n = self.costs.iter().position(|c| c.class == class).unwrap_or_else(|| {
            self.costs.push(Cost { class, times: 0, time: Duration::ZERO });
            self.costs.len() - 1
        });
        if let Some(cost) = self.costs.get_mut(n) {
            cost.times += 1;
            cost.time += time;
        }
    }

    /// What was counted, the costliest class first.
    pub fn costs(&self) -> Vec<Cost> {
        let mut costs = self.costs.clone();
        costs.sort_by_key(|c| std::cmp::Reverse(c.time));
        costs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_counts_from_the_start_on() {
        let mut watch = Stopwatch::default();
        watch.out(|| unreachable!("it is off"));
        watch.back();
        watch.start();
        for class in ["a", "b", "a"] {
            watch.out(|| class);
            std::thread::sleep(Duration::from_millis(if class == "b" { 30 } else { 1 }));
            watch.back();
            // Nothing was begun.
            watch.back();
        }
        let costs = watch.costs();
        assert_eq!(costs.iter().map(|c| (c.class, c.times)).collect::<Vec<_>>(), [("b", 1), ("a", 2)]);
        assert!(costs[1].time >= Duration::from_millis(2), "{costs:?}");
    }
}
