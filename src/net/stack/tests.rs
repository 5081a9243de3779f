//! A guest whose TCP, UDP and DHCP are smoltcp's too, frame by frame against the network.

use super::*;
use rustix::event::{EventfdFlags, eventfd};
use smoltcp::socket::{dhcpv4, tcp, udp};
use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::time::Instant as Clock;

struct Guest {
    queues: Queues,
    interface: Interface,
    sockets: SocketSet<'static>,
    stack: Stack,
}

impl Guest {
    fn new() -> Guest {
        let mut queues = Queues::default();
        let config = Config::new(HardwareAddress::Ethernet(EthernetAddress(crate::net::MAC)));
        let mut interface = Interface::new(config, &mut queues, Instant::now());
        interface.update_ip_addrs(|list| list.push(IpCidr::new(GUEST.into(), 24)).expect("room"));
        interface.routes_mut().add_default_ipv4_route(GATEWAY).expect("room");
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd"));
        Guest { queues, interface, sockets: SocketSet::new(Vec::new()), stack: Stack::new(bell) }
    }

    /// Lets frames pass both ways until something is so.
    fn until<T>(&mut self, mut ready: impl FnMut(&mut SocketSet<'static>, &mut Interface) -> Option<T>) -> T {
        let started = Clock::now();
        loop {
            self.interface.poll(Instant::now(), &mut self.queues, &mut self.sockets);
            if let Some(found) = ready(&mut self.sockets, &mut self.interface) {
                return found;
            }
            std::mem::take(&mut self.queues.to_guest).into_iter().for_each(|f| self.stack.take_in(f));
            self.stack.turn();
            self.queues.to_stack.extend(self.stack.take_frames());
            assert!(started.elapsed() < Duration::from_secs(30), "nothing comes");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn tcp_socket() -> tcp::Socket<'static> {
    tcp::Socket::new(tcp::SocketBuffer::new(vec![0; 9000]), tcp::SocketBuffer::new(vec![0; 9000]))
}

#[test]
fn a_connection_to_the_host_carries_bytes_both_ways_and_ends() {
    const LENGTH: usize = 300_000;
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let host = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a guest");
        let mut got = Vec::new();
        stream.read_to_end(&mut got).expect("until the guest's end");
        stream.write_all(&got).expect("the guest reads");
        got.len()
    });
    let mut g = Guest::new();
    let handle = g.sockets.add(tcp_socket());
    let socket = g.sockets.get_mut::<tcp::Socket<'_>>(handle);
    socket.connect(g.interface.context(), (GATEWAY, port), 49_152).expect("not connected yet");
    let sent: Vec<u8> = (0..LENGTH).map(|n| ((n * n) >> 7) as u8).collect();
    let (mut at, mut got) = (0, Vec::new());
    g.until(|sockets, _| {
        let s = sockets.get_mut::<tcp::Socket<'_>>(handle);
        if at < LENGTH && s.can_send() {
            at += s.send_slice(&sent[at..]).expect("open");
            if at == LENGTH {
                s.close();
            }
        }
        while s.can_recv() {
            s.recv(|b| (b.len(), got.extend_from_slice(b))).expect("open");
        }
        (got.len() == LENGTH && !s.may_recv()).then_some(())
    });
    assert!(got == sent);
    assert_eq!(host.join().expect("no panic"), LENGTH);
}

#[test]
fn where_nobody_listens_the_connection_is_reset() {
    let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port();
    let mut g = Guest::new();
    let handle = g.sockets.add(tcp_socket());
    let socket = g.sockets.get_mut::<tcp::Socket<'_>>(handle);
    socket.connect(g.interface.context(), (GATEWAY, port), 49_153).expect("not connected yet");
    g.until(|sockets, _| (!sockets.get::<tcp::Socket<'_>>(handle).is_open()).then_some(()));
    assert_eq!(g.until(|_, _| Some(0)), 0);
}

#[test]
fn datagrams_go_to_the_host_and_come_back() {
    let host = UdpSocket::bind("127.0.0.1:0").expect("a port");
    let port = host.local_addr().expect("bound").port();
    let answers = std::thread::spawn(move || {
        let mut b = [0; 64];
        let (n, from) = host.recv_from(&mut b).expect("a datagram");
        b[..n].reverse();
        host.send_to(&b[..n], from).expect("sent");
    });
    let mut g = Guest::new();
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 4], vec![0; 2000]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    socket.bind(5000).expect("free");
    socket.send_slice(b"hello", (GATEWAY, port)).expect("room");
    let handle = g.sockets.add(socket);
    let (said, from) = g.until(|sockets, _| {
        let s = sockets.get_mut::<udp::Socket<'_>>(handle);
        s.recv().ok().map(|(bytes, meta)| (bytes.to_vec(), meta.endpoint))
    });
    assert_eq!((said.as_slice(), from), (&b"olleh"[..], (GATEWAY, port).into()));
    answers.join().expect("no panic");
}

#[test]
fn an_address_by_dhcp() {
    let mut g = Guest::new();
    g.interface.update_ip_addrs(|list| list.clear());
    let handle = g.sockets.add(dhcpv4::Socket::new());
    let given = g.until(|sockets, _| match sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll() {
        Some(dhcpv4::Event::Configured(c)) => Some((c.address, c.router, c.dns_servers.to_vec())),
        _ => None,
    });
    assert_eq!(given, (smoltcp::wire::Ipv4Cidr::new(GUEST, 24), Some(GATEWAY), vec![RESOLVER]));
}

#[test]
fn anything_is_a_frame() {
    let mut g = Guest::new();
    let mut x = 1u64;
    for n in 0..20_000usize {
        let mut frame = vec![0u8; n % 90];
        for b in &mut frame {
            x = x.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            *b = (x >> 56) as u8;
        }
        // Most of them look like something that is served: IPv4 without options, but for no conversation with the host.
        if frame.len() > 34 && n % 4 != 0 {
            frame[12..16].copy_from_slice(&[8, if n % 16 == 1 { 6 } else { 0 }, 0x45, 0]);
            frame[20..24].copy_from_slice(&[0, 0, 64, 6]);
            frame[30..34].copy_from_slice(&[10, 0, 2, 200]);
        }
        g.stack.take_in(frame);
    }
    g.stack.turn();
    g.stack.take_frames();
}

#[test]
fn the_host_is_where_the_gateway_is_and_neighbours_are_nowhere() {
    assert_eq!(host_address(GATEWAY), Some(Ipv4Addr::LOCALHOST));
    assert_eq!(host_address(Ipv4Address::new(93, 184, 216, 34)), Some(Ipv4Addr::new(93, 184, 216, 34)));
    for nowhere in [[10, 0, 2, 7], [255; 4], [224, 0, 0, 1], [127, 0, 0, 1], [0; 4]] {
        assert_eq!(host_address(Ipv4Address::from(nowhere)), None, "{nowhere:?}");
    }
}
