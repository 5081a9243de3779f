//! A clock that ticks in a thread as it uses its processor: what is running when it ticks is what takes the time.
#![allow(unsafe_code)]

use crate::host::kicker::Kicker;
use crate::host::syscall::raw;
use std::time::Duration;

/// The address of this tells our ticks from timers of the guest.
static MARK: u8 = 0;

/// A timer on the processor time of the thread that made it (timer_create(2)), which sends it [`Kicker::SIGNAL`].
#[derive(Debug)]
pub struct Ticker {
    id: i32,
    thread: i32,
}

impl Ticker {
    /// For the calling thread; `None` if the host has no timer to give.
    pub fn new(thread: i32) -> Option<Ticker> {
        // SAFETY: zeros are a valid value of this structure of the kernel's.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = Kicker::SIGNAL;
        event.sigev_notify_thread_id = thread;
        event.sigev_value.sival_ptr = (&raw const MARK).cast_mut().cast();
        let mut id = 0i32;
        let clock = libc::CLOCK_THREAD_CPUTIME_ID as u64;
        // SAFETY: the kernel reads `event` and writes `id`.
        let r = unsafe {
            raw(libc::SYS_timer_create as u64, [clock, &raw const event as u64, &raw mut id as u64, 0, 0, 0])
        };
        (r == 0).then_some(Ticker { id, thread })
    }

    /// Is it this thread's? Not a forked child's, though it has a copy of this.
    pub fn is_of(&self, thread: i32) -> bool {
        self.thread == thread
    }

    /// Ticks once, after so much more processor time.
    pub fn tick_after(&self, time: Duration) {
        let spec = libc::itimerspec {
            it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: libc::timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) },
        };
        // SAFETY: the kernel reads `spec`; of a timer that is not there it says so.
        unsafe { raw(libc::SYS_timer_settime as u64, [self.id as u64, 0, &raw const spec as u64, 0, 0, 0]) };
    }

    /// Is this signal a tick?
    ///
    /// # Safety
    /// `info` is what the kernel gave a handler of `sig`.
    pub unsafe fn has_ticked(sig: i32, info: *const libc::siginfo_t) -> bool {
        // SAFETY: the kernel's; of timers the value is there.
        unsafe {
            sig == Kicker::SIGNAL
                && (*info).si_code == libc::SI_TIMER
                && (*info).si_value().sival_ptr.cast_const() == (&raw const MARK).cast()
        }
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        // SAFETY: plain system calls. A forked child has no timer of its parent's; what has this number there is another.
        unsafe {
            if raw(libc::SYS_gettid as u64, [0; 6]) == i64::from(self.thread) {
                raw(libc::SYS_timer_delete as u64, [self.id as u64, 0, 0, 0, 0, 0]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waits for a tick by using the processor.
    fn burn(set: &libc::sigset_t) -> bool {
        let begin = std::time::Instant::now();
        while begin.elapsed() < Duration::from_secs(60) {
            let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: plain system call that fills `info` in if it gives a signal.
            unsafe {
                let mut info: libc::siginfo_t = std::mem::zeroed();
                let sig = libc::sigtimedwait(set, &mut info, &now);
                if sig > 0 {
                    return Ticker::has_ticked(sig, &info);
                }
            }
        }
        false
    }

    #[test]
    fn a_thread_that_uses_time_has_its_ticks() {
        // SAFETY: the signal is blocked in this thread alone.
        let (thread, set) = unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, Kicker::SIGNAL);
            assert_eq!(libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()), 0);
            (libc::gettid(), set)
        };
        let ticker = Ticker::new(thread).expect("a timer");
        assert!(ticker.is_of(thread) && !ticker.is_of(thread + 1));
        for _ in 0..2 {
            ticker.tick_after(Duration::from_millis(1));
            assert!(burn(&set));
        }
    }
}
