//! Frames taken apart and put together: just what the network needs besides TCP.

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, IpAddress, IpProtocol, Ipv4Address, Ipv4Packet,
    Ipv4Repr, TcpPacket, UdpPacket, UdpRepr,
};

/// A datagram of the guest's, or for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Where it comes from.
    pub source: (Ipv4Address, u16),
    /// Where it goes.
    pub target: (Ipv4Address, u16),
    /// What it says.
    pub payload: Vec<u8>,
}

/// What a frame is to the network.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// A question for the address of somebody.
    Arp(Ipv4Address),
    /// The first segment of a connection: from where, and to where.
    Syn((Ipv4Address, u16), (Ipv4Address, u16)),
    /// Any other segment.
    Tcp,
    /// A datagram.
    Udp(Datagram),
    /// Nothing that is served.
    Other,
}

/// Looks at a frame; gives the sender too.
pub fn look(bytes: &[u8]) -> Option<(EthernetAddress, Frame)> {
    let frame = EthernetFrame::new_checked(bytes).ok()?;
    let sender = frame.src_addr();
    let what = match frame.ethertype() {
        EthernetProtocol::Arp => {
            let target: [u8; 4] = frame.payload().get(24..28)?.try_into().ok()?;
            Frame::Arp(Ipv4Address::from(target))
        }
        EthernetProtocol::Ipv4 => ip(frame.payload())?,
        _ => Frame::Other,
    };
    Some((sender, what))
}

fn ip(bytes: &[u8]) -> Option<Frame> {
    let packet = Ipv4Packet::new_checked(bytes).ok()?;
    if packet.more_frags() || packet.frag_offset() != 0 {
        return Some(Frame::Other);
    }
    let (source, target) = (packet.src_addr(), packet.dst_addr());
    Some(match packet.next_header() {
        IpProtocol::Tcp => {
            let segment = TcpPacket::new_checked(packet.payload()).ok()?;
            match segment.syn() && !segment.ack() {
                true => Frame::Syn((source, segment.src_port()), (target, segment.dst_port())),
                false => Frame::Tcp,
            }
        }
        IpProtocol::Udp => {
            let d = UdpPacket::new_checked(packet.payload()).ok()?;
            let payload = d.payload().to_vec();
            Frame::Udp(Datagram { source: (source, d.src_port()), target: (target, d.dst_port()), payload })
        }
        _ => Frame::Other,
    })
}

/// The frame of a datagram; `None` if it is too long for one.
pub fn udp(from: EthernetAddress, to: EthernetAddress, d: &Datagram) -> Option<Vec<u8>> {
    const HEADERS: usize = 14 + 20 + 8;
    const MTU: usize = 1500;
    if d.payload.len() + HEADERS - 14 > MTU {
        return None;
    }
    let mut bytes = vec![0; HEADERS + d.payload.len()];
    let ethernet = EthernetRepr { src_addr: from, dst_addr: to, ethertype: EthernetProtocol::Ipv4 };
    ethernet.emit(&mut EthernetFrame::new_unchecked(&mut bytes[..]));
    let ip = Ipv4Repr {
        src_addr: d.source.0,
        dst_addr: d.target.0,
        next_header: IpProtocol::Udp,
        payload_len: 8 + d.payload.len(),
        hop_limit: 64,
    };
    let checksums = ChecksumCapabilities::default();
    ip.emit(&mut Ipv4Packet::new_unchecked(&mut bytes[14..]), &checksums);
    let udp = UdpRepr { src_port: d.source.1, dst_port: d.target.1 };
    let (source, target) = (IpAddress::Ipv4(d.source.0), IpAddress::Ipv4(d.target.0));
    let mut packet = UdpPacket::new_unchecked(&mut bytes[34..]);
    udp.emit(&mut packet, &source, &target, d.payload.len(), |b| b.copy_from_slice(&d.payload), &checksums);
    Some(bytes)
}
