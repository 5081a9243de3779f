//! What is on the machine's text screen: characters and attributes read from video memory, and the characters' meaning (code page 437).

use crate::devices::vga::TextMode;
use crate::mem::GuestMemory;

/// Code page 437 as the VGA's character generator shows it.
const CP437: &str = "\
\u{20}☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼ !\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~⌂\
ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■ ";

/// A text screen at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Screen {
    /// Characters in a row.
    pub columns: usize,
    /// Character code and attribute (foreground in bits 3:0, background in bits 7:4), row by row.
    pub cells: Vec<(u8, u8)>,
    /// Row and column of the cursor, if it is shown.
    pub cursor: Option<(usize, usize)>,
    /// Bit 7 of an attribute is blinking, not a bright background.
    pub blinks: bool,
}

impl Screen {
    /// Reads it from video memory, which a mode says where to find.
    pub(super) fn read(mem: &GuestMemory, mode: TextMode) -> Screen {
        let mut cells = Vec::with_capacity(mode.rows * mode.columns);
        let mut row = vec![0; 2 * mode.columns];
        for n in 0..mode.rows as u64 {
            if mem.read(mode.start + n * mode.stride, &mut row).is_none() {
                row.fill(0);
            }
            cells.extend(row.chunks_exact(2).map(|c| (c[0], c[1])));
        }
        Screen { columns: mode.columns, cells, cursor: mode.cursor, blinks: mode.blinks }
    }

    /// Its rows, each of [`Screen::columns`] cells.
    pub fn rows(&self) -> impl Iterator<Item = &[(u8, u8)]> {
        self.cells.chunks_exact(self.columns.max(1))
    }

    /// The character that a code looks like.
    pub fn character(code: u8) -> char {
        CP437.chars().nth(usize::from(code)).unwrap_or(' ')
    }

    /// A row as text, without spaces at its end.
    pub fn text(row: &[(u8, u8)]) -> String {
        let text: String = row.iter().map(|(code, _)| Screen::character(*code)).collect();
        text.trim_end().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::vga::Vga;
    use crate::mem::Ram;

    #[test]
    fn each_code_has_its_character() {
        assert_eq!(CP437.chars().count(), 256);
        let known =
            [(1, '☺'), (0x41, 'A'), (0x7f, '⌂'), (0x80, 'Ç'), (0xb3, '│'), (0xdb, '█'), (0xe1, 'ß'), (0xfe, '■')];
        for (code, character) in known {
            assert_eq!(Screen::character(code), character, "{code:#x}");
        }
    }

    #[test]
    fn rows_are_read_from_video_memory() {
        let mem = GuestMemory::Ram(Ram::new(1 << 20).expect("a MiB"));
        mem.write(0xb_8000 + 160, b"H\x07i\x1f").expect("RAM");
        let screen = Screen::read(&mem, Vga::default().text_mode().expect("mode 3"));
        let rows: Vec<String> = screen.rows().map(Screen::text).collect();
        assert_eq!((rows.len(), rows[0].as_str(), rows[1].as_str()), (25, "", "Hi"));
        assert_eq!(screen.cells[81], (b'i', 0x1f));
    }
}
