//! What drives tell of themselves: IDENTIFY DEVICE and IDENTIFY PACKET DEVICE (ATA/ATAPI-6, T13 1410D, 8.15 and 8.16).

use super::{Drive, Kind, put_text};
use crate::devices::disk::SECTOR;

/// Sectors that cylinders, heads and sectors can name: 16,383 cylinders of 16 heads and 63 sectors.
const MOST_CYLINDERS: u64 = 16_383;

impl Drive {
    /// The drive's size in sectors.
    pub(super) fn sectors(&self) -> u64 {
        self.disk().size() / SECTOR
    }

    /// The 512 bytes.
    pub(super) fn identify(&self) -> Vec<u8> {
        let mut w = [0u16; 256];
        put_text(&mut w[10..20], "BIV00001");
        put_text(&mut w[23..27], env!("CARGO_PKG_VERSION"));
        // Times in nanoseconds, and the transfer modes: multi-word DMA 0 to 2, PIO 3 and 4, Ultra DMA 0 to 5; which is on.
        w[64] = 3;
        w[65..69].fill(120);
        let chosen = |kind: u8| if self.mode & 0xf8 == kind { 1 << (8 + (self.mode & 7)) } else { 0 };
        w[63] = 7 | chosen(0x20);
        w[88] = 0x3f | chosen(0x40);
        w[53] = 7;
        // ATA/ATAPI-4 to -6.
        w[80] = 0x70;
        match self.kind {
            Kind::Disk => self.identify_disk(&mut w),
            Kind::Cd => {
                put_text(&mut w[27..47], "Bivisor CD-ROM");
                // By packets of 12 bytes, a CD-ROM device, removable, data within 50 us.
                w[0] = 0x85c0;
                w[49] = 0x0f00;
                // The device reset, packet and NOP commands.
                w[82] = 1 << 14 | 1 << 9 | 1 << 4;
                w[85] = w[82];
                w[83] = 1 << 14;
                w[84] = 1 << 14;
                w[87] = 1 << 14;
            }
        }
        w.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    fn identify_disk(&self, w: &mut [u16; 256]) {
        let all = self.sectors();
        let low = |n: u64| n as u16;
        put_text(&mut w[27..47], "Bivisor disk");
        w[0] = 0x40;
        let cylinders = (all / (16 * 63)).min(MOST_CYLINDERS);
        (w[1], w[3], w[6]) = (low(cylinders), 16, 63);
        let (heads, sectors) = self.geometry;
        let now = (all / (u64::from(heads) * u64::from(sectors)).max(1)).min(0xffff);
        let capacity = now * u64::from(heads) * u64::from(sectors);
        (w[54], w[55], w[56], w[57], w[58]) = (low(now), heads, sectors, low(capacity), low(capacity >> 16));
        // Blocks of up to 16 sectors, and how many are set.
        w[47] = 0x8010;
        w[59] = if self.multiple != 0 { 0x100 | u16::from(self.multiple) } else { 0 };
        w[48] = 1;
        // Block addresses, DMA, IORDY.
        w[49] = 0x0f00;
        let small = all.min(0x0fff_ffff);
        (w[60], w[61]) = (low(small), low(small >> 16));
        // NOP, write cache; FLUSH CACHE (EXT), 48-bit addresses.
        w[82] = 1 << 14 | 1 << 5;
        w[83] = 1 << 14 | 1 << 13 | 1 << 12 | 1 << 10;
        w[84] = 1 << 14;
        w[85] = 1 << 14 | if self.write_cache { 1 << 5 } else { 0 };
        w[86] = w[83] & !(1 << 14);
        w[87] = 1 << 14;
        for (n, word) in w[100..104].iter_mut().enumerate() {
            *word = low(all >> (16 * n));
        }
    }
}
