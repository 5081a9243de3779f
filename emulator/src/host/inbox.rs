//! What the signal handler leaves for a thread's guest: one slot for each signal, filled in the handler, emptied by the task's loop.
//!
//! One slot is enough. When a signal is put in that the guest must see, the handler makes its thread return with everything blocked
//! ([`NEVER_BLOCKED`] excepted), so the kernel keeps further ones, in its own order, until the task has built the frame of the first
//! and sets the mask the guest then has. The signals that are never blocked on the host coalesce as standard signals do (signal(7)).
#![allow(unsafe_code)]

use crate::host::kicker::Kicker;
use crate::host::signal::{NEVER_BLOCKED, REG_RIP, bit};
use crate::host::syscall::fixup;
use crate::host::thread::ThreadBlock;
use crate::host::ticker::Ticker;
use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// `siginfo_t` as the kernel has it.
pub type Info = [u8; 128];

/// Signals that the kernel delivers before others (SYNCHRONOUS_MASK of kernel/signal.c).
const FIRST: u64 = bit(libc::SIGSEGV)
    | bit(libc::SIGBUS)
    | bit(libc::SIGILL)
    | bit(libc::SIGTRAP)
    | bit(libc::SIGFPE)
    | bit(libc::SIGSYS);

/// A thread's slots.
pub struct Inbox {
    /// Not 0: there is something the guest does not block. [`crate::host::syscall::interruptible`] looks at it.
    flag: AtomicU32,
    /// Filled slots, as a sigset_t.
    filled: AtomicU64,
    /// What the guest blocks; matters here for [`NEVER_BLOCKED`] only, the kernel knows the rest.
    blocked: AtomicU64,
    /// The handler ran for nothing the guest gets now.
    disturbed: AtomicBool,
    kicker: Kicker,
    slots: [UnsafeCell<Info>; 64],
}

impl std::fmt::Debug for Inbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inbox").field("filled", &self.filled).field("blocked", &self.blocked).finish_non_exhaustive()
    }
}

impl Inbox {
    /// Empty; what comes in requests a stop of the engine that `kicker` belongs to.
    pub fn new(kicker: Kicker) -> Box<Inbox> {
        Box::new(Inbox {
            flag: AtomicU32::new(0),
            filled: AtomicU64::new(0),
            blocked: AtomicU64::new(0),
            disturbed: AtomicBool::new(false),
            kicker,
            slots: std::array::from_fn(|_| UnsafeCell::new([0; 128])),
        })
    }

    /// The calling thread's signals come in here until [`Inbox::detach`], which the owner calls before it drops the inbox or moves
    /// away from the thread.
    pub fn attach(&self, block: &ThreadBlock) {
        block.process_data.set(std::ptr::from_ref(self).cast_mut().cast::<c_void>());
        block.process_hook.set(Some(hook));
    }

    /// The calling thread's signals come in nowhere.
    pub fn detach(&self, block: &ThreadBlock) {
        block.process_hook.set(None);
        block.process_data.set(std::ptr::null_mut());
    }

    /// The flag of interruptible system calls.
    pub fn flag(&self) -> &AtomicU32 {
        &self.flag
    }

    /// Is there something to deliver?
    #[inline(always)]
    pub fn any(&self) -> bool {
        self.flag.load(Ordering::Relaxed) != 0
    }

    /// Has the handler run, since this was last asked, for something that the guest does not get (now)? Then an EINTR is our doing.
    pub fn take_disturbed(&self) -> bool {
        self.disturbed.swap(false, Ordering::Relaxed)
    }

    /// What the guest blocks from now on.
    pub fn set_blocked(&self, mask: u64) {
        self.blocked.store(mask, Ordering::SeqCst);
        self.look();
    }

    /// Signals that are here and blocked by the guest: pending ones that the host's kernel does not know of.
    pub fn held(&self) -> u64 {
        self.filled.load(Ordering::SeqCst) & self.blocked.load(Ordering::SeqCst) & NEVER_BLOCKED
    }

    /// Takes the next signal for delivery.
    pub fn take(&self) -> Option<(i32, Info)> {
        let ready = self.ready();
        let ready = if ready & FIRST != 0 { ready & FIRST } else { ready };
        self.take_from(ready)
    }

    /// Takes a signal of `set`, blocked or not.
    pub fn take_from(&self, set: u64) -> Option<(i32, Info)> {
        let found = self.filled.load(Ordering::SeqCst) & set;
        if found == 0 {
            self.look();
            return None;
        }
        let index = found.trailing_zeros();
        // SAFETY: the slot is filled, so the handler, which runs on this thread only, leaves it alone until the bit is cleared.
        let info = unsafe { *self.slots[index as usize].get() };
        self.filled.fetch_and(!(1 << index), Ordering::SeqCst);
        self.look();
        Some((index as i32 + 1, info))
    }

    /// Forgets everything (in a new process, whose parent had these).
    pub fn clear(&self) {
        self.filled.store(0, Ordering::SeqCst);
        self.look();
    }

    fn ready(&self) -> u64 {
        self.filled.load(Ordering::SeqCst) & !(self.blocked.load(Ordering::SeqCst) & NEVER_BLOCKED)
    }

    /// Sets the flag anew. The handler may run at any point: it fills first and sets the flag last.
    fn look(&self) {
        self.flag.store(0, Ordering::SeqCst);
        if self.ready() != 0 {
            self.flag.store(1, Ordering::SeqCst);
        }
    }
}

/// Puts a signal in. True if the guest must stop for it.
///
/// # Safety
/// Called by the handler of [`crate::host::signal`] with its arguments, on the thread of the inbox that `process_data` names.
unsafe fn hook(block: &ThreadBlock, sig: i32, info: *mut libc::siginfo_t, uc: *mut libc::ucontext_t) -> bool {
    // SAFETY: `attach` set the pointer, `detach` comes before the inbox goes; info and context are the kernel's. The context's mask is
    // the kernel's 8 bytes, the first of libc's type.
    unsafe {
        let inbox = &*block.process_data.get().cast::<Inbox>();
        let kick = sig == Kicker::SIGNAL && (*info).si_code == libc::SI_TKILL && inbox.kicker.arrived();
        if kick || Ticker::has_ticked(sig, info) {
            inbox.disturbed.store(true, Ordering::Relaxed);
            return false;
        }
        if inbox.filled.load(Ordering::SeqCst) & bit(sig) == 0 {
            info.cast::<Info>().copy_to(inbox.slots[(sig - 1) as usize].get(), 1);
            inbox.filled.fetch_or(bit(sig), Ordering::SeqCst);
        }
        if inbox.ready() & bit(sig) == 0 {
            inbox.disturbed.store(true, Ordering::Relaxed);
            return false;
        }
        inbox.flag.store(1, Ordering::SeqCst);
        inbox.kicker.request();
        (&raw mut (*uc).uc_sigmask).cast::<u64>().write(!NEVER_BLOCKED);
        let pc = &mut (*uc).uc_mcontext.gregs[REG_RIP];
        if let Some(abort) = fixup(*pc as u64) {
            *pc = abort as i64;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::signal::{attach, mask, route, send_to_thread, set_mask};
    use crate::host::syscall::{Aborted, interruptible};

    fn send(sig: i32) {
        // SAFETY: plain system call.
        send_to_thread(unsafe { libc::gettid() }, sig);
    }

    fn getpid(flag: &AtomicU32) -> Result<i64, Aborted> {
        // SAFETY: no arguments.
        unsafe { interruptible(flag, libc::SYS_getpid as u64, [0; 6]) }
    }

    /// One signal at a time comes in; the kernel keeps the others until the mask lets them through.
    #[test]
    fn one_at_a_time() {
        let block = attach();
        let inbox = Inbox::new(Kicker::default());
        inbox.attach(block);
        set_mask(0);
        for sig in [libc::SIGUSR1, libc::SIGUSR2, libc::SIGSEGV] {
            route(sig, 0);
        }
        assert_eq!(getpid(inbox.flag()), Ok(i64::from(std::process::id())));
        send(libc::SIGUSR2);
        assert!(inbox.any());
        assert_eq!(mask() & bit(libc::SIGUSR1), bit(libc::SIGUSR1), "everything is blocked");
        send(libc::SIGUSR1);
        assert_eq!(getpid(inbox.flag()), Err(Aborted));
        let (sig, info) = inbox.take().expect("the first");
        assert_eq!((sig, info[0]), (libc::SIGUSR2, libc::SIGUSR2 as u8));
        assert_eq!(inbox.take(), None);
        assert!(getpid(inbox.flag()).is_ok());
        set_mask(0);
        assert_eq!(inbox.take().map(|(sig, _)| sig), Some(libc::SIGUSR1));
        set_mask(0);

        // A fault that is sent while the guest blocks it is kept here.
        inbox.set_blocked(bit(libc::SIGSEGV));
        send(libc::SIGSEGV);
        assert!(!inbox.any() && inbox.held() == bit(libc::SIGSEGV) && inbox.take_disturbed());
        inbox.set_blocked(0);
        assert!(inbox.any() && inbox.held() == 0);
        assert_eq!(inbox.take().map(|(sig, _)| sig), Some(libc::SIGSEGV));
        inbox.detach(block);
        set_mask(0);
    }

    /// A kick that arrives after its engine has come out by itself is not the guest's; what others send is.
    #[test]
    fn late_kicks_are_not_the_guests() {
        std::thread::spawn(|| {
            let block = attach();
            let kicker = Kicker::default();
            let inbox = Inbox::new(kicker.clone());
            inbox.attach(block);
            set_mask(0);
            route(Kicker::SIGNAL, 0);
            // SAFETY: plain system call.
            kicker.entered(unsafe { libc::gettid() });
            kicker.expect();
            assert!(!kicker.requested());
            send(Kicker::SIGNAL);
            assert!(!inbox.any(), "ours");
            send(Kicker::SIGNAL);
            assert!(inbox.any(), "sent by somebody else");
            inbox.take();
            inbox.detach(block);
            set_mask(0);
        })
        .join()
        .expect("no panic");
    }
}
