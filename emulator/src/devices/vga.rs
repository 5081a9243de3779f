//! VGA registers and what they say of a text screen (IBM PS/2 hardware interface reference, video subsystem). Video memory is the
//! machine's RAM from 0xA0000 on, as it is without planes: text modes need no more, graphics modes are not shown.

type Ns = u64;

/// A picture takes so long: 70 Hz, of which the last twentieth is the vertical retrace.
const FRAME: Ns = 14_268_000;
const LINE: Ns = 31_778;

/// Registers after a BIOS has set mode 3: 80 columns, 25 rows, 16 colours, 9x16 characters.
const SEQUENCER: [u8; 5] = [3, 0, 3, 0, 2];
const CRTC: [u8; 25] = [
    0x5f, 0x4f, 0x50, 0x82, 0x55, 0x81, 0xbf, 0x1f, 0, 0x4f, 0x0d, 0x0e, 0, 0, 0, 0, 0x9c, 0x8e, 0x8f, 0x28, 0x1f,
    0x96, 0xb9, 0xa3, 0xff,
];
const GRAPHICS: [u8; 9] = [0, 0, 0, 0, 0, 0x10, 0x0e, 0, 0xff];
const ATTRIBUTE: [u8; 21] =
    [0, 1, 2, 3, 4, 5, 0x14, 7, 0x38, 0x39, 0x3a, 0x3b, 0x3c, 0x3d, 0x3e, 0x3f, 0x0c, 0, 0x0f, 8, 0];
const MISCELLANEOUS: u8 = 0x67;

/// Where a text screen is in memory and what is on it besides characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextMode {
    /// Guest-physical address of the first character; two bytes each, the second its attribute.
    pub start: u64,
    /// Bytes from one row to the next.
    pub stride: u64,
    /// Characters in a row.
    pub columns: usize,
    /// Rows.
    pub rows: usize,
    /// Row and column of the cursor, if it is on and on the screen.
    pub cursor: Option<(usize, usize)>,
    /// Bit 7 of an attribute is blinking, not a bright background.
    pub blinks: bool,
}

/// The chip.
#[derive(Clone, Debug)]
pub struct Vga {
    miscellaneous: u8,
    feature: u8,
    sequencer: (u8, [u8; 5]),
    crtc: (u8, [u8; 25]),
    graphics: (u8, [u8; 9]),
    attribute: (u8, [u8; 21]),
    /// The next write of port 0x3C0 is data.
    attribute_data: bool,
    palette: Box<[u8; 768]>,
    mask: u8,
    /// Byte of the palette that is read or written next.
    palette_read: u16,
    palette_write: u16,
    reading_palette: bool,
}

impl Default for Vga {
    fn default() -> Vga {
        Vga {
            miscellaneous: MISCELLANEOUS,
            feature: 0,
            sequencer: (0, SEQUENCER),
            crtc: (0, CRTC),
            graphics: (0, GRAPHICS),
            attribute: (0x20, ATTRIBUTE),
            attribute_data: false,
            palette: Box::new([0; 768]),
            mask: 0xff,
            palette_read: 0,
            palette_write: 0,
            reading_palette: false,
        }
    }
}

fn get(registers: &[u8], index: u8) -> u8 {
    registers.get(usize::from(index)).copied().unwrap_or(0)
}

fn set(registers: &mut [u8], index: u8, v: u8) {
    if let Some(register) = registers.get_mut(usize::from(index)) {
        *register = v;
    }
}

impl Vga {
    /// Are the CRT controller's ports at 0x3Dx (colour) and not at 0x3Bx?
    fn is_colour(&self) -> bool {
        self.miscellaneous & 1 != 0
    }

    /// Is this one of the CRT controller's and status ports, with the miscellaneous register as it is? They have two places.
    fn answers(&self, port: u16) -> bool {
        (0x3c0..=0x3cf).contains(&port) || (port >= 0x3d0) == self.is_colour()
    }

    /// Input status 1: in the blank parts of a line or picture, and in vertical retrace.
    fn status(&self, now: Ns) -> u8 {
        let retrace = now % FRAME >= FRAME - FRAME / 20;
        let blank = retrace || now % LINE >= LINE * 4 / 5;
        u8::from(blank) | u8::from(retrace) << 3
    }

    /// Reads port 0x3B0 to 0x3DF.
    pub fn read(&mut self, port: u16, now: Ns) -> u8 {
        if !self.answers(port) {
            return 0xff;
        }
        match port {
            0x3c0 => self.attribute.0,
            0x3c1 => get(&self.attribute.1, self.attribute.0 & 0x1f),
            // Input status 0: switch sense, as a colour display has it.
            0x3c2 => 0x10,
            0x3c4 => self.sequencer.0,
            0x3c5 => get(&self.sequencer.1, self.sequencer.0),
            0x3c6 => self.mask,
            0x3c7 => {
                if self.reading_palette {
                    3
                } else {
                    0
                }
            }
            0x3c8 => (self.palette_write / 3) as u8,
            0x3c9 => {
                let v = self.palette[usize::from(self.palette_read) % 768];
                self.palette_read = (self.palette_read + 1) % 768;
                v
            }
            0x3ca => self.feature,
            0x3cc => self.miscellaneous,
            0x3ce => self.graphics.0,
            0x3cf => get(&self.graphics.1, self.graphics.0),
            0x3b4 | 0x3d4 => self.crtc.0,
            0x3b5 | 0x3d5 => get(&self.crtc.1, self.crtc.0),
            0x3ba | 0x3da => {
                self.attribute_data = false;
                self.status(now)
            }
            _ => 0xff,
        }
    }

    /// Writes port 0x3B0 to 0x3DF.
    pub fn write(&mut self, port: u16, v: u8) {
        if !self.answers(port) {
            return;
        }
        match port {
            0x3c0 => {
                let is_data = self.attribute_data;
                self.attribute_data = !is_data;
                if is_data {
                    let index = self.attribute.0 & 0x1f;
                    // The palette takes writes only while it does not drive the screen.
                    if index >= 0x10 || self.attribute.0 & 0x20 == 0 {
                        set(&mut self.attribute.1, index, if index < 0x10 { v & 0x3f } else { v });
                    }
                } else {
                    self.attribute.0 = v & 0x3f;
                }
            }
            0x3c2 => self.miscellaneous = v,
            0x3c4 => self.sequencer.0 = v & 7,
            0x3c5 => set(&mut self.sequencer.1, self.sequencer.0, v),
            0x3c6 => self.mask = v,
            0x3c7 => {
                self.palette_read = u16::from(v) * 3;
                self.reading_palette = true;
            }
            0x3c8 => {
                self.palette_write = u16::from(v) * 3;
                self.reading_palette = false;
            }
            0x3c9 => {
                self.palette[usize::from(self.palette_write) % 768] = v & 0x3f;
                self.palette_write = (self.palette_write + 1) % 768;
            }
            0x3ce => self.graphics.0 = v & 15,
            0x3cf => set(&mut self.graphics.1, self.graphics.0, v),
            0x3b4 | 0x3d4 => self.crtc.0 = v & 0x1f,
            0x3b5 | 0x3d5 => self.write_crtc(v),
            0x3ba | 0x3da => self.feature = v & 3,
            _ => {}
        }
    }

    /// Bit 7 of register 0x11 protects registers 0 to 7, but for the line-compare bit of 7.
    fn write_crtc(&mut self, v: u8) {
        let (index, registers) = (self.crtc.0, &mut self.crtc.1);
        match index {
            7 if registers[0x11] & 0x80 != 0 => registers[7] = registers[7] & !0x10 | v & 0x10,
            0..=7 if registers[0x11] & 0x80 != 0 => {}
            _ => set(registers, index, v),
        }
    }

    /// The text screen; `None` in graphics modes and while the screen is off.
    pub fn text_mode(&self) -> Option<TextMode> {
        let (r, g) = (&self.crtc.1, &self.graphics.1);
        if g[6] & 1 != 0 || self.attribute.1[0x10] & 1 != 0 || self.sequencer.1[1] & 0x20 != 0 {
            return None;
        }
        let lines = usize::from(r[0x12]) | usize::from(r[7] & 2) << 7 | usize::from(r[7] & 0x40) << 3;
        let (columns, rows) = (usize::from(r[1]) + 1, (lines + 1) / (usize::from(r[9] & 0x1f) + 1));
        // A row of no more than 256 characters, a screen of no more than 32 KiB.
        let stride = u64::from(r[0x13]) * 4;
        let rows = rows.min(0x8000 / (2 * columns));
        let base = match g[6] >> 2 & 3 {
            0 | 1 => 0xa_0000,
            2 => 0xb_0000,
            _ => 0xb_8000,
        };
        let first = u64::from(r[0xc]) << 8 | u64::from(r[0xd]);
        let at = (u64::from(r[0xe]) << 8 | u64::from(r[0xf])).checked_sub(first).filter(|_| stride != 0);
        let place = at.map(|at| ((2 * at / stride) as usize, (2 * at % stride / 2) as usize));
        let cursor = place.filter(|(row, column)| r[0xa] & 0x20 == 0 && *row < rows && *column < columns);
        Some(TextMode {
            start: base + 2 * first % 0x8000,
            stride,
            columns,
            rows,
            cursor,
            blinks: self.attribute.1[0x10] & 8 != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crtc(v: &mut Vga, index: u8, value: u8) {
        v.write(0x3d4, index);
        v.write(0x3d5, value);
    }

    #[test]
    fn mode_3_and_its_cursor() {
        let mut v = Vga::default();
        let text = v.text_mode().expect("text");
        assert_eq!((text.start, text.stride, text.columns, text.rows), (0xb_8000, 160, 80, 25));
        assert_eq!(text.cursor, Some((0, 0)));
        // Scrolled by a row, the cursor at row 2, column 5 of what is shown.
        crtc(&mut v, 0xd, 80);
        crtc(&mut v, 0xf, 245);
        let text = v.text_mode().expect("text");
        assert_eq!((text.start, text.cursor), (0xb_80a0, Some((2, 5))));
        crtc(&mut v, 0xa, 0x20);
        assert_eq!(v.text_mode().expect("text").cursor, None, "off");
    }

    #[test]
    fn fifty_rows_by_characters_of_eight_lines() {
        let mut v = Vga::default();
        crtc(&mut v, 9, 0x47);
        assert_eq!(v.text_mode().map(|t| t.rows), Some(50));
    }

    #[test]
    fn graphics_and_a_dark_screen_are_no_text() {
        let mut v = Vga::default();
        v.write(0x3c4, 1);
        v.write(0x3c5, 0x20);
        assert_eq!(v.text_mode(), None);
        v.write(0x3c5, 0);
        v.write(0x3ce, 6);
        v.write(0x3cf, 5);
        assert_eq!(v.text_mode(), None);
    }

    #[test]
    fn protected_registers_and_the_flip_flop() {
        let mut v = Vga::default();
        crtc(&mut v, 1, 39);
        assert_eq!(v.text_mode().map(|t| t.columns), Some(80), "protected");
        crtc(&mut v, 0x11, 0x0e);
        crtc(&mut v, 1, 39);
        assert_eq!(v.text_mode().map(|t| t.columns), Some(40));
        v.read(0x3da, 0);
        v.write(0x3c0, 0x30);
        v.write(0x3c0, 0x04);
        assert_eq!(v.read(0x3c1, 0), 4);
        assert_eq!(v.read(0x3b5, 0), 0xff, "monochrome ports are elsewhere");
    }

    #[test]
    fn retrace_comes_and_goes() {
        let mut v = Vga::default();
        assert_eq!((v.read(0x3da, 0) & 8, v.read(0x3da, FRAME - 1) & 9), (0, 9));
    }

    #[test]
    fn the_palette_counts_by_itself() {
        let mut v = Vga::default();
        v.write(0x3c8, 255);
        for n in 1..=4 {
            v.write(0x3c9, n);
        }
        v.write(0x3c7, 255);
        let read: Vec<u8> = (0..4).map(|_| v.read(0x3c9, 0)).collect();
        assert_eq!(read, [1, 2, 3, 4], "255 is followed by 0");
    }
}
