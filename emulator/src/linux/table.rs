//! Every system call: its number, name, arguments, and which way it goes: passed through, handled or refused.

use crate::linux::syscall::Handler;

/// Which way a system call goes.
#[derive(Clone, Copy)]
pub enum Status {
    /// To the host's kernel with the same arguments.
    PassedThrough,
    /// By a function of ours.
    Handled(Handler),
    /// Not at all: this errno.
    Refused(i32),
}

/// What the kernel does with the call when a signal with a handler interrupts it (signal(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// It never gives EINTR because of a signal, or EINTR is final for the guest to see.
    Never,
    /// Restarted if the handler has SA_RESTART, else EINTR (ERESTARTSYS).
    IfAsked,
    /// EINTR whenever a handler ran, restarted when none did (ERESTARTNOHAND, ERESTART_RESTARTBLOCK).
    WithoutHandler,
}

/// One system call.
pub struct Row {
    /// Number in RAX.
    pub number: u32,
    /// Name as in its man page.
    pub name: &'static str,
    /// Arguments for `--strace`, one word each: see [`crate::linux::table`].
    pub args: &'static str,
    /// Which way it goes.
    pub status: Status,
    /// When interrupted.
    pub restart: Restart,
    /// Why, where it is not plain.
    pub note: &'static str,
}

/// The row of a number.
pub fn row(number: u32) -> Option<&'static Row> {
    let _ = number;
    None
}
