//! UDP: DHCP is answered here, names are asked of the host's resolver, and the rest goes through a socket of the host for each conversation.

use super::packet::Datagram;
use super::stack::{GATEWAY, GUEST, RESOLVER, host_address};
use rustix::event::{PollFd, PollFlags};
use smoltcp::wire::{DhcpMessageType, DhcpPacket, DhcpRepr, Ipv4Address};
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::time::{Duration, Instant};

const DHCP_SERVER: u16 = 67;
const DHCP_CLIENT: u16 = 68;
const DNS: u16 = 53;
/// Conversations at once, and how long one lasts without a word.
const MOST: usize = 256;
const SILENCE: Duration = Duration::from_secs(60);

struct Conversation {
    guest: (Ipv4Address, u16),
    target: (Ipv4Address, u16),
    socket: UdpSocket,
    last: Instant,
}

/// All conversations.
#[derive(Default)]
pub struct Datagrams {
    open: Vec<Conversation>,
}

/// The first resolver that the host asks.
fn resolver() -> Option<Ipv4Addr> {
    let text = std::fs::read_to_string("/etc/resolv.conf").ok()?;
    text.lines().find_map(|l| l.strip_prefix("nameserver")?.trim().parse().ok())
}

impl Datagrams {
    /// Takes a datagram of the guest; gives an answer that is ours.
    pub fn take_in(&mut self, d: Datagram) -> Option<Datagram> {
        if d.target.1 == DHCP_SERVER {
            return dhcp(&d.payload);
        }
        let same = |c: &&mut Conversation| (c.guest, c.target) == (d.source, d.target);
        if let Some(c) = self.open.iter_mut().find(same) {
            c.last = Instant::now();
            let _ = c.socket.send(&d.payload);
            return None;
        }
        let to = match d.target {
            (RESOLVER, DNS) => resolver()?,
            (address, _) => host_address(address)?,
        };
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
        socket.connect(SocketAddrV4::new(to, d.target.1)).ok()?;
        socket.set_nonblocking(true).ok()?;
        let _ = socket.send(&d.payload);
        if self.open.len() >= MOST {
            self.open.remove(0);
        }
        self.open.push(Conversation { guest: d.source, target: d.target, socket, last: Instant::now() });
        None
    }

    /// What came from the host's sockets.
    pub fn take(&mut self) -> Vec<Datagram> {
        let mut out = Vec::new();
        self.open.retain_mut(|c| {
            let mut buffer = [0; 2048];
            // An error (nobody listens there) is for the guest to find out by waiting.
            while let Ok(n) = c.socket.recv(&mut buffer) {
                c.last = Instant::now();
                out.push(Datagram { source: c.target, target: c.guest, payload: buffer[..n].to_vec() });
            }
            c.last.elapsed() < SILENCE
        });
        out
    }

    /// The sockets to wait for.
    pub fn watch<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        fds.extend(self.open.iter().map(|c| PollFd::new(&c.socket, PollFlags::IN)));
    }
}

/// The answer of a server that knows one client (RFC 2131).
fn dhcp(request: &[u8]) -> Option<Datagram> {
    let packet = DhcpPacket::new_checked(request).ok()?;
    let asked = DhcpRepr::parse(&packet).ok()?;
    let message_type = match asked.message_type {
        DhcpMessageType::Discover => DhcpMessageType::Offer,
        DhcpMessageType::Request if asked.requested_ip.unwrap_or(asked.client_ip) == GUEST => DhcpMessageType::Ack,
        DhcpMessageType::Request => DhcpMessageType::Nak,
        _ => return None,
    };
    let given = message_type != DhcpMessageType::Nak;
    let answer = DhcpRepr {
        message_type,
        transaction_id: asked.transaction_id,
        secs: 0,
        client_hardware_address: asked.client_hardware_address,
        client_ip: Ipv4Address::UNSPECIFIED,
        your_ip: if given { GUEST } else { Ipv4Address::UNSPECIFIED },
        server_ip: GATEWAY,
        router: given.then_some(GATEWAY),
        subnet_mask: given.then_some(Ipv4Address::new(255, 255, 255, 0)),
        relay_agent_ip: Ipv4Address::UNSPECIFIED,
        broadcast: true,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(GATEWAY),
        parameter_request_list: None,
        dns_servers: given.then(|| [RESOLVER].into_iter().collect()),
        max_size: None,
        lease_duration: given.then_some(86_400),
        renew_duration: None,
        rebind_duration: None,
        additional_options: &[],
    };
    let mut payload = vec![0; answer.buffer_len()];
    answer.emit(&mut DhcpPacket::new_unchecked(&mut payload[..])).ok()?;
    Some(Datagram { source: (GATEWAY, DHCP_SERVER), target: (Ipv4Address::BROADCAST, DHCP_CLIENT), payload })
}

/// Is it over, or only nothing to do now?
pub fn is_over(e: &std::io::Error) -> bool {
    !matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
