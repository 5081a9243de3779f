//! `--net user`: a network of the guest's own behind the host's sockets, which needs no rights (as QEMU's user networking, 10.0.2.0/24).

mod datagrams;
mod packet;
mod stack;
mod streams;

use anyhow::{Context, Result};
use bivisor_emulator::devices::virtio::net::Wire;
use bivisor_emulator::machine::Remote;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::time::Timespec;
use stack::Stack;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The guest's card, as QEMU's first.
pub const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
/// Frames that wait for the guest; what is more is lost.
const MOST: usize = 1024;
/// The longest sleep, so that old connections are looked at.
const NAP: Duration = Duration::from_secs(1);

/// What card and network share.
#[derive(Default)]
struct Mailbox {
    frames: Mutex<VecDeque<Vec<u8>>>,
    machine: Mutex<Option<Remote>>,
}

/// The way from the network to a machine.
pub struct Network(Arc<Mailbox>);

impl Network {
    /// From now on the machine is told of frames; `None`: nobody is.
    pub fn attach(&self, machine: Option<Remote>) {
        *self.0.machine.lock().unwrap_or_else(PoisonError::into_inner) = machine;
    }
}

/// The card's end.
struct Cable {
    to: Sender<Vec<u8>>,
    bell: Arc<OwnedFd>,
    mailbox: Arc<Mailbox>,
}

impl Wire for Cable {
    fn send(&mut self, frame: &[u8]) {
        if self.to.send(frame.to_vec()).is_ok() {
            let _ = rustix::io::write(&*self.bell, &1u64.to_ne_bytes());
        }
    }

    fn receive(&mut self) -> Option<Vec<u8>> {
        self.mailbox.frames.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        // The network sees that nobody is there when it looks.
        let _ = rustix::io::write(&*self.bell, &1u64.to_ne_bytes());
    }
}

/// Starts a network: the card's cable, and the way to tell the machine. It ends with the cable.
///
/// # Errors
/// The host's.
pub fn user() -> Result<(Box<dyn Wire>, Network)> {
    let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("--net user")?;
    let (bell, mailbox, (to, from)) = (Arc::new(bell), Arc::<Mailbox>::default(), channel());
    let (ours, letters) = (bell.clone(), mailbox.clone());
    std::thread::Builder::new()
        .name("network".into())
        .spawn(move || serve(Stack::new(ours.clone()), &from, &ours, &letters))
        .context("--net user")?;
    Ok((Box::new(Cable { to, bell, mailbox: mailbox.clone() }), Network(mailbox)))
}

/// The network's thread.
fn serve(mut stack: Stack, from: &Receiver<Vec<u8>>, bell: &OwnedFd, mailbox: &Mailbox) {
    loop {
        loop {
            match from.try_recv() {
                Ok(frame) => stack.take_in(frame),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return,
            }
        }
        let wait = stack.turn().map_or(NAP, |d| d.min(NAP));
        let frames = stack.take_frames();
        if !frames.is_empty() {
            let mut waiting = mailbox.frames.lock().unwrap_or_else(PoisonError::into_inner);
            let room = MOST.saturating_sub(waiting.len());
            waiting.extend(frames.into_iter().take(room));
            drop(waiting);
            let machine = mailbox.machine.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(machine) = machine {
                machine.frames_arrived();
            }
        }
        let mut fds = vec![PollFd::new(bell, PollFlags::IN)];
        stack.watch(&mut fds);
        let wait = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
        let _ = poll(&mut fds, Some(&wait));
        let mut count = [0; 8];
        let _ = rustix::io::read(bell, &mut count);
    }
}
