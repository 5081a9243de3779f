//! Making an engine return from another thread or from a signal handler: a flag, and a signal for engines that do not poll it.

use crate::host::signal::send_to_thread;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};

/// Another thread's (or a signal handler's) way to make [`crate::vcpu::Vcpu::run`] return [`crate::vcpu::Exit::Kicked`] soon.
#[derive(Clone, Debug, Default)]
pub struct Kicker {
    flag: Arc<AtomicBool>,
    /// Host thread that is inside `run`, if a signal is needed to get it out; 0 if the engine polls.
    thread: Arc<AtomicI32>,
    /// Signals sent that have not arrived, or more: two that meet arrive as one.
    sent: Arc<AtomicU32>,
}

impl Kicker {
    /// The signal sent to a thread that runs guest code natively.
    pub const SIGNAL: i32 = libc::SIGSTKFLT;

    /// Asks; async-signal-safe. A kick that finds the engine outside `run` ends the next `run` at once.
    pub fn kick(&self) {
        self.flag.store(true, Ordering::SeqCst);
        let tid = self.thread.load(Ordering::SeqCst);
        if tid != 0 {
            self.expect();
            send_to_thread(tid, Kicker::SIGNAL);
        }
    }

    /// [`Kicker::SIGNAL`] is about to be sent: it is ours when it arrives, even if whoever it is for has come out by himself meanwhile.
    pub fn expect(&self) {
        self.sent.fetch_add(1, Ordering::SeqCst);
    }

    /// [`Kicker::SIGNAL`] has arrived: is it one of ours?
    pub fn arrived(&self) -> bool {
        let ours = self.sent.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok();
        ours || self.requested()
    }

    /// Sets the flag only: for a signal handler running on the vCPU's own thread, which then makes the engine look.
    pub fn request(&self) {
        self.flag.store(true, Ordering::SeqCst);
    }

    /// For engines: has somebody asked? Does not clear.
    #[inline(always)]
    pub fn requested(&self) -> bool {
        self.flag.load(Ordering::Relaxed)
    }

    /// For engines whose generated code looks at the flag itself: the address of one byte, not 0 if somebody asked.
    pub fn flag_address(&self) -> *const AtomicBool {
        Arc::as_ptr(&self.flag)
    }

    /// For engines: take the request, just before returning [`crate::vcpu::Exit::Kicked`].
    pub fn take(&self) -> bool {
        self.flag.swap(false, Ordering::SeqCst)
    }

    /// For engines that run guest code natively: from now on this thread is inside `run` and needs [`Kicker::SIGNAL`].
    pub fn entered(&self, tid: i32) {
        self.thread.store(tid, Ordering::SeqCst);
    }

    /// For engines: no longer inside `run`.
    pub fn left(&self) {
        self.thread.store(0, Ordering::SeqCst);
    }
}
