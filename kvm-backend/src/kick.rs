//! Getting a thread out of KVM_RUN: by a signal, without losing one that arrives just before the call.
//!
//! While a thread is inside [`Kickable`], the signal handler of [`bivisor_emulator::host`] sets `kvm_run.immediate_exit`, so that
//! KVM_RUN returns EINTR even if the signal was handled before the thread was in the kernel (Documentation/virt/kvm/api.rst).
#![allow(unsafe_code)]

use bivisor_emulator::host::signal::attach;
use bivisor_emulator::host::thread::ThreadBlock;
use bivisor_emulator::vcpu::Kicker;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

/// From its creation to its drop, signals to the calling thread end KVM_RUN.
pub struct Kickable {
    kicker: Kicker,
    immediate_exit: *const AtomicU8,
    block: &'static ThreadBlock,
}

impl Kickable {
    /// For the whole of a [`bivisor_emulator::vcpu::Vcpu::run`], so that no signal falls between two calls of KVM_RUN. `immediate_exit` is that of the vCPU that the calling thread is about to run, from [`crate::vm::immediate_exit`]; the vCPU
    /// must outlive this.
    pub fn new(kicker: &Kicker, immediate_exit: *const AtomicU8) -> Kickable {
        let block = attach();
        block.engine_data.set(immediate_exit.cast_mut().cast());
        block.engine_hook.set(Some(hook));
        // SAFETY: no arguments, cannot fail.
        kicker.entered(unsafe { libc::gettid() });
        Kickable { kicker: kicker.clone(), immediate_exit, block }
    }

    /// After KVM_RUN returned EINTR, and before looking at the kicker: the next KVM_RUN may run.
    pub fn rearm(&self) {
        // SAFETY: the vCPU's mapping is alive, see `new`.
        unsafe { (*self.immediate_exit).store(0, Ordering::SeqCst) };
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        self.kicker.left();
        self.block.engine_hook.set(None);
        self.rearm();
    }
}

/// Async-signal-safe: one store.
///
/// # Safety
/// `engine_data` is what [`Kickable::new`] set.
unsafe fn hook(block: &ThreadBlock, sig: i32, _: *mut libc::siginfo_t, _: *mut libc::ucontext_t) -> bool {
    // SAFETY: the hook is set only while the vCPU is alive.
    unsafe { (*block.engine_data.get().cast::<AtomicU8>()).store(1, Ordering::SeqCst) };
    // Other signals are the process personality's.
    sig == Kicker::SIGNAL
}

/// A timer that sends the calling thread [`Kicker::SIGNAL`] once.
pub struct Alarm {
    timer: libc::timer_t,
    deadline: Instant,
}

impl Alarm {
    /// `None` if the host refuses.
    pub fn after(time: Duration) -> Option<Alarm> {
        let deadline = Instant::now() + time;
        // SAFETY: plain system calls with structures of ours; the event names the calling thread.
        unsafe {
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = Kicker::SIGNAL;
            event.sigev_notify_thread_id = libc::gettid();
            let mut timer: libc::timer_t = std::ptr::null_mut();
            if libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) != 0 {
                return None;
            }
            let mut spec: libc::itimerspec = std::mem::zeroed();
            spec.it_value.tv_sec = time.as_secs() as i64;
            spec.it_value.tv_nsec = i64::from(time.subsec_nanos()).max(1);
            libc::timer_settime(timer, 0, &spec, std::ptr::null_mut());
            Some(Alarm { timer, deadline })
        }
    }
}

impl Alarm {
    /// Has the time passed?
    pub fn over(&self) -> bool {
        Instant::now() >= self.deadline
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: the timer is ours.
        unsafe { libc::timer_delete(self.timer) };
    }
}
