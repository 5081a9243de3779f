//! What this process inherited and the Rust runtime changes before `main`: SIGPIPE becomes ignored, and closed standard descriptors
//! become /dev/null. A guest must see what bivisor was given.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

static PIPE_IGNORED: AtomicBool = AtomicBool::new(false);
/// Bit n: descriptor n was closed.
static CLOSED: AtomicU32 = AtomicU32::new(0);

/// The C library calls this before the runtime starts.
// SAFETY: the section holds pointers to functions of this type; the function uses system calls and atomics only.
#[used]
#[unsafe(link_section = ".init_array")]
static REMEMBER: extern "C" fn() = remember;

extern "C" fn remember() {
    // SAFETY: plain calls; the structure is filled by the kernel.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGPIPE, std::ptr::null(), &mut action);
        PIPE_IGNORED.store(action.sa_sigaction == libc::SIG_IGN, Ordering::Relaxed);
        let closed = (0..3).filter(|&fd| libc::fcntl(fd, libc::F_GETFD) == -1).fold(0, |all, fd| all | 1 << fd);
        CLOSED.store(closed, Ordering::Relaxed);
    }
}

/// Puts it back. Standard error stays open for bivisor's own messages until the guest runs: call it last.
pub fn restore() {
    // SAFETY: SIGPIPE's disposition is nobody else's; the descriptors were opened by the runtime and nobody holds them.
    unsafe {
        if !PIPE_IGNORED.load(Ordering::Relaxed) {
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        }
        for fd in (0..3).filter(|fd| CLOSED.load(Ordering::Relaxed) >> fd & 1 != 0) {
            libc::close(fd);
        }
    }
}
