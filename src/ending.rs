//! SIGINT, SIGTERM and SIGHUP while a machine runs: they end the machine, so that what waits is written and the terminal is as before, and
//! then the program, which dies of the signal as it would have at once (signal(7), sigwait(3)). A second one does not wait for that.
//! SIGWINCH: the terminal has another size, and the virtio console is told.
#![allow(unsafe_code)]

use crate::terminal::{Attached, tell_size};
use bivisor_emulator::machine::{End, Remote};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

const SIGNALS: [i32; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// The signals, taken from now on.
pub struct Ending {
    machine: Arc<Attached>,
    /// The signal that came, else 0.
    came: Arc<AtomicI32>,
}

impl Ending {
    /// Takes them, but for those that are ignored (nohup(1)). Before there are other threads, which inherit that they are blocked.
    pub fn watch() -> Ending {
        let ending = Ending { machine: Arc::default(), came: Arc::default() };
        let mut taken: Vec<i32> = SIGNALS.into_iter().filter(|s| !is_ignored(*s)).collect();
        taken.push(libc::SIGWINCH);
        let set = set(&taken);
        mask(libc::SIG_BLOCK, &set);
        let (machine, came) = (ending.machine.clone(), ending.came.clone());
        std::thread::spawn(move || {
            let mut signal = 0;
            // SAFETY: both are ours and live; the signals are blocked in all threads.
            while unsafe { libc::sigwait(&raw const set, &raw mut signal) } == 0 {
                if signal == libc::SIGWINCH {
                    let machine = machine.clone();
                    std::thread::spawn(move || tell_size(&machine.wait()));
                    continue;
                }
                if came.swap(signal, Ordering::AcqRel) != 0 {
                    die(signal);
                }
                let machine = machine.clone();
                // Waits for a machine, if one is just being made.
                std::thread::spawn(move || machine.wait().end(End::Quit));
            }
        });
        ending
    }

    /// From now on this machine is ended, or none.
    pub fn attach(&self, machine: Option<Remote>) {
        self.machine.set(machine);
    }

    /// Dies of the signal that came, if one did.
    pub fn die_if_told(&self) {
        let signal = self.came.load(Ordering::Acquire);
        if signal != 0 {
            die(signal);
        }
    }
}

fn die(signal: i32) {
    mask(libc::SIG_UNBLOCK, &set(&[signal]));
    // SAFETY: no memory is involved; its action is the default, which ends the program.
    unsafe { libc::raise(signal) };
}

fn is_ignored(signal: i32) -> bool {
    // SAFETY: zero is a value of this plain structure, which is ours to be written to.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &raw mut action) == 0 && action.sa_sigaction == libc::SIG_IGN
    }
}

fn set(signals: &[i32]) -> libc::sigset_t {
    // SAFETY: sigemptyset makes a set of what is ours, and zero is a value of it before.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in signals {
            libc::sigaddset(&raw mut set, *signal);
        }
        set
    }
}

fn mask(how: i32, set: &libc::sigset_t) {
    // SAFETY: the set is live, and the old mask is not wanted.
    unsafe { libc::pthread_sigmask(how, set, std::ptr::null_mut()) };
}
