//! What this process inherited and the Rust runtime changes before `main`: SIGPIPE becomes ignored, and closed standard descriptors
//! become /dev/null. A guest must see what bivisor was given.
#![allow(unsafe_code)]

use crate::host::signal::{bit, inherited_ignored};
use std::sync::atomic::{AtomicU32, Ordering};

/// Bit n: descriptor n was closed.
static CLOSED: AtomicU32 = AtomicU32::new(0);

/// The C library calls this before the runtime starts.
// SAFETY: the section holds pointers to functions of this type; the function uses system calls and atomics only.
#[used]
#[unsafe(link_section = ".init_array")]
static REMEMBER: extern "C" fn() = remember;

extern "C" fn remember() {
    // SAFETY: plain call.
    let closed = |fd: &i32| unsafe { libc::fcntl(*fd, libc::F_GETFD) == -1 };
    CLOSED.store((0..3).filter(closed).fold(0, |all, fd| all | 1 << fd), Ordering::Relaxed);
}

/// Puts it back. Standard error stays open for bivisor's own messages until the guest runs: call it last.
pub fn restore() {
    // SAFETY: SIGPIPE's disposition is nobody else's; the descriptors were opened by the runtime and nobody holds them.
    unsafe {
        if inherited_ignored() & bit(libc::SIGPIPE) == 0 {
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        }
        for fd in (0..3).filter(|fd| CLOSED.load(Ordering::Relaxed) >> fd & 1 != 0) {
            libc::close(fd);
        }
    }
}
