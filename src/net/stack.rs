//! The network itself: a gateway that takes every connection of the guest, over the TCP of the smoltcp crate.

use super::datagrams::Datagrams;
use super::packet::{self, Frame};
use super::streams::Streams;
use rustix::event::PollFd;
use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, Ipv4Address};
use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

/// The host, as QEMU's user network has it: what the guest sends there goes to the host's loopback address.
pub const GATEWAY: Ipv4Address = Ipv4Address::new(10, 0, 2, 2);
/// Answers questions for names.
pub const RESOLVER: Ipv4Address = Ipv4Address::new(10, 0, 2, 3);
/// The guest's address, by DHCP.
pub const GUEST: Ipv4Address = Ipv4Address::new(10, 0, 2, 15);
const GATEWAY_MAC: EthernetAddress = EthernetAddress([0x52, 0x55, 10, 0, 2, 2]);
const MTU: usize = 1514;

/// Where the host connects to for an address of the guest's; `None`: nowhere.
pub fn host_address(a: Ipv4Address) -> Option<Ipv4Addr> {
    match a {
        GATEWAY => Some(Ipv4Addr::LOCALHOST),
        a if a.octets()[..3] == GATEWAY.octets()[..3] => None,
        a if a.is_multicast() || a.is_broadcast() || a.is_unspecified() || a.is_loopback() => None,
        a => Some(a),
    }
}

/// Frames on the way into the stack and out of it.
#[derive(Default)]
struct Queues {
    to_stack: VecDeque<Vec<u8>>,
    to_guest: Vec<Vec<u8>>,
}

struct Received(Vec<u8>);
struct Sending<'a>(&'a mut Vec<Vec<u8>>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push(frame);
        result
    }
}

impl Device for Queues {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sending<'_>)> {
        let frame = self.to_stack.pop_front()?;
        Some((Received(frame), Sending(&mut self.to_guest)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        Some(Sending(&mut self.to_guest))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut c = DeviceCapabilities::default();
        c.max_transmission_unit = MTU;
        c.medium = Medium::Ethernet;
        c
    }
}

/// The network.
pub struct Stack {
    queues: Queues,
    interface: Interface,
    sockets: SocketSet<'static>,
    streams: Streams,
    datagrams: Datagrams,
    /// The guest's card, as its frames say.
    guest: EthernetAddress,
    /// Ends the network's sleep.
    bell: Arc<OwnedFd>,
}

impl Stack {
    /// Nobody is connected to anything.
    pub fn new(bell: Arc<OwnedFd>) -> Stack {
        let mut queues = Queues::default();
        let mut config = Config::new(HardwareAddress::Ethernet(GATEWAY_MAC));
        config.random_seed = std::process::id().into();
        let mut interface = Interface::new(config, &mut queues, Instant::now());
        interface.update_ip_addrs(|list| {
            // The list has room for two at least.
            let _ = list.push(IpCidr::new(GATEWAY.into(), 24));
            let _ = list.push(IpCidr::new(RESOLVER.into(), 24));
        });
        // Every address is taken whose way leads through the gateway, which is us.
        interface.set_any_ip(true);
        let _ = interface.routes_mut().add_default_ipv4_route(GATEWAY);
        Stack {
            queues,
            interface,
            sockets: SocketSet::new(Vec::new()),
            streams: Streams::default(),
            datagrams: Datagrams::default(),
            guest: EthernetAddress::BROADCAST,
            bell,
        }
    }

    /// A frame of the guest's.
    pub fn take_in(&mut self, frame: Vec<u8>) {
        let Some((sender, what)) = packet::look(&frame) else { return };
        if sender.is_unicast() {
            self.guest = sender;
        }
        match what {
            // The guest may ask whether its own address is taken.
            Frame::Arp(GATEWAY | RESOLVER) | Frame::Tcp => self.queues.to_stack.push_back(frame),
            Frame::Syn(source, target) => {
                // What came before decides whether this one is new.
                self.poll();
                self.streams.open(source, target, &mut self.sockets, &self.bell);
                self.queues.to_stack.push_back(frame);
            }
            Frame::Udp(d) => {
                if let Some(answer) = self.datagrams.take_in(d) {
                    self.queues.to_guest.extend(packet::udp(GATEWAY_MAC, self.guest, &answer));
                }
            }
            Frame::Arp(_) | Frame::Other => {}
        }
    }

    fn poll(&mut self) {
        self.interface.poll(Instant::now(), &mut self.queues, &mut self.sockets);
    }

    /// Does what is to be done; gives how long there is nothing to do but for what comes from outside.
    pub fn turn(&mut self) -> Option<Duration> {
        self.poll();
        self.streams.pump(&mut self.sockets);
        self.poll();
        self.streams.clean(&mut self.sockets);
        for d in self.datagrams.take() {
            self.queues.to_guest.extend(packet::udp(GATEWAY_MAC, self.guest, &d));
        }
        self.interface.poll_delay(Instant::now(), &self.sockets).map(|d| Duration::from_micros(d.total_micros()))
    }

    /// Frames for the guest.
    pub fn take_frames(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.queues.to_guest)
    }

    /// What to wait for.
    pub fn watch<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        self.streams.watch(&self.sockets, fds);
        self.datagrams.watch(fds);
    }
}

#[cfg(test)]
mod tests;
