//! TCP: each connection of the guest ends in a socket of the stack, whose bytes go through a connection of the host.

use super::datagrams::is_over;
use super::stack::host_address;
use rustix::event::{PollFd, PollFlags};
use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::wire::{IpEndpoint, IpListenEndpoint, Ipv4Address};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;

/// Connections at once, bytes on the way in each direction of one, and how long the host may take to connect.
const MOST: usize = 256;
const BUFFER: usize = 1 << 16;
const PATIENCE: Duration = Duration::from_secs(20);

/// Address and port.
type Place = (Ipv4Address, u16);

enum Host {
    Connecting(Receiver<Option<TcpStream>>),
    Open { stream: TcpStream, read_ended: bool, write_ended: bool },
}

struct Flow {
    handle: SocketHandle,
    host: Host,
}

/// All connections.
#[derive(Default)]
pub struct Streams {
    flows: Vec<Flow>,
}

impl Streams {
    /// The guest begins a connection: a socket will take it, and the host connects to the same place.
    pub fn open(&mut self, source: Place, target: Place, sockets: &mut SocketSet<'_>, bell: &Arc<OwnedFd>) {
        let Some(address) = host_address(target.0) else { return };
        let endpoint = |p: Place| IpEndpoint::new(p.0.into(), p.1);
        let listen = IpListenEndpoint { addr: Some(target.0.into()), port: target.1 };
        // A segment that comes again finds the socket that was made for it.
        let known = |f: &Flow| {
            let s = sockets.get::<Socket<'_>>(f.handle);
            let taken = s.remote_endpoint() == Some(endpoint(source)) && s.local_endpoint() == Some(endpoint(target));
            taken || s.is_listening() && s.listen_endpoint() == listen
        };
        if self.flows.len() >= MOST || self.flows.iter().any(known) {
            return;
        }
        let buffer = || SocketBuffer::new(vec![0; BUFFER]);
        let mut socket = Socket::new(buffer(), buffer());
        if socket.listen(listen).is_err() {
            return;
        }
        let (to, from) = channel();
        let bell = bell.clone();
        let connect = move || {
            let to_there = SocketAddr::V4(SocketAddrV4::new(address, target.1));
            let stream = TcpStream::connect_timeout(&to_there, PATIENCE).ok();
            let stream = stream.filter(|s| s.set_nonblocking(true).is_ok() && s.set_nodelay(true).is_ok());
            let _ = to.send(stream);
            let _ = rustix::io::write(&*bell, &1u64.to_ne_bytes());
        };
        // Without a thread there is no connection, and the guest hears nothing.
        if std::thread::Builder::new().name("connect".into()).spawn(connect).is_ok() {
            self.flows.push(Flow { handle: sockets.add(socket), host: Host::Connecting(from) });
        }
    }

    /// Moves what can be moved.
    pub fn pump(&mut self, sockets: &mut SocketSet<'_>) {
        for flow in &mut self.flows {
            let socket = sockets.get_mut::<Socket<'_>>(flow.handle);
            if let Host::Connecting(from) = &flow.host {
                match from.try_recv() {
                    Ok(Some(stream)) => flow.host = Host::Open { stream, read_ended: false, write_ended: false },
                    Ok(None) | Err(TryRecvError::Disconnected) => socket.abort(),
                    Err(TryRecvError::Empty) => {}
                }
            }
            if let Host::Open { stream, read_ended, write_ended } = &mut flow.host {
                to_host(socket, stream, write_ended);
                to_guest(socket, stream, read_ended);
            }
        }
    }

    /// Forgets connections that are over; to be called when the stack has sent what they had to say.
    pub fn clean(&mut self, sockets: &mut SocketSet<'_>) {
        self.flows.retain(|flow| {
            let over = matches!(sockets.get::<Socket<'_>>(flow.handle).state(), State::Closed | State::TimeWait);
            if over {
                sockets.remove(flow.handle);
            }
            !over
        });
    }

    /// The sockets to wait for: those that have something for the guest that it has room for, or take what it has said.
    pub fn watch<'a>(&'a self, sockets: &SocketSet<'_>, fds: &mut Vec<PollFd<'a>>) {
        for flow in &self.flows {
            let Host::Open { stream, read_ended, .. } = &flow.host else { continue };
            let socket = sockets.get::<Socket<'_>>(flow.handle);
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, socket.can_send() && !read_ended);
            flags.set(PollFlags::OUT, socket.can_recv());
            if !flags.is_empty() {
                fds.push(PollFd::new(stream, flags));
            }
        }
    }
}

fn to_host(socket: &mut Socket<'_>, stream: &mut TcpStream, ended: &mut bool) {
    while socket.can_recv() {
        let moved = socket.recv(|bytes| match stream.write(bytes) {
            Ok(n) => (n, Ok(n)),
            Err(e) => (0, Err(e)),
        });
        match moved {
            Ok(Ok(1..)) => {}
            Ok(Err(e)) if is_over(&e) => return socket.abort(),
            _ => return,
        }
    }
    // The guest has said all it will say.
    if !*ended && matches!(socket.state(), State::CloseWait | State::LastAck | State::Closing) {
        *ended = true;
        let _ = stream.shutdown(Shutdown::Write);
    }
}

fn to_guest(socket: &mut Socket<'_>, stream: &mut TcpStream, ended: &mut bool) {
    while !*ended && socket.can_send() {
        let moved = socket.send(|room| match stream.read(room) {
            Ok(n) => (n, Ok(n)),
            Err(e) => (0, Err(e)),
        });
        match moved {
            Ok(Ok(0)) => {
                *ended = true;
                socket.close();
            }
            Ok(Ok(_)) => {}
            Ok(Err(e)) if is_over(&e) => return socket.abort(),
            _ => return,
        }
    }
}
