//! `--serial pty`: the serial port on a new pseudoterminal, for minicom, screen, or another program.

use crate::terminal::Attached;
use anyhow::{Context, Result};
use bivisor_emulator::machine::{Remote, Sink};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags, fcntl_setfl, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use std::fs::File;
use std::io::Read;
use std::sync::Arc;

/// An open pseudoterminal.
pub struct Pty {
    ours: File,
    /// Kept open, so that the other program may come and go.
    _theirs: std::os::fd::OwnedFd,
    machine: Arc<Attached>,
    /// What the other program opens.
    pub name: String,
}

impl Pty {
    /// Makes one.
    ///
    /// # Errors
    /// The host's.
    pub fn open() -> Result<Pty> {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).context("--serial pty")?;
        grantpt(&ours).and_then(|()| unlockpt(&ours)).context("--serial pty")?;
        let name = ptsname(&ours, Vec::new()).context("--serial pty")?;
        let theirs =
            open(&name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).context("--serial pty")?;
        let mut raw = tcgetattr(&theirs).context("--serial pty")?;
        raw.make_raw();
        tcsetattr(&theirs, OptionalActions::Now, &raw).context("--serial pty")?;
        // The guest does not wait for somebody who does not read.
        fcntl_setfl(&ours, OFlags::NONBLOCK).context("--serial pty")?;
        let ours = File::from(ours);
        let machine = Arc::<Attached>::default();
        let (mut from, to) = (ours.try_clone().context("--serial pty")?, machine.clone());
        std::thread::spawn(move || {
            let mut buffer = [0; 256];
            loop {
                let ready = poll(&mut [PollFd::new(&from, PollFlags::IN)], None);
                if ready.is_err_and(|e| e != rustix::io::Errno::INTR) {
                    return;
                }
                match from.read(&mut buffer) {
                    Ok(n @ 1..) => to.wait().type_serial(&buffer[..n]),
                    Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted) => {}
                    _ => return,
                }
            }
        });
        Ok(Pty { ours, _theirs: theirs, machine, name: name.to_string_lossy().into_owned() })
    }

    /// Where the guest's bytes go.
    ///
    /// # Errors
    /// The host's.
    pub fn sink(&self) -> Result<Sink> {
        Ok(Sink::new(Box::new(self.ours.try_clone().context("--serial pty")?)))
    }

    /// From now on what comes goes to this machine; to none: it waits.
    pub fn set(&self, machine: Option<Remote>) {
        self.machine.set(machine);
    }
}
