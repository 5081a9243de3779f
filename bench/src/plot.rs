//! The ratios as a picture: one bar a program and engine, on a logarithmic scale, as SVG.

use crate::Ratios;
use std::fmt::Write;

const LEFT: f64 = 190.0;
const WIDTH: f64 = 900.0;
const ROW: f64 = 18.0;
const COLOURS: [&str; 6] = ["#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#9c6b4e"];

/// An SVG document. A line marks native speed; the thin line on a bar reaches from the smallest to the largest ratio.
pub fn svg(rows: &[Ratios]) -> String {
    let most = rows.iter().map(|r| r.max).fold(2.0, f64::max);
    let least = rows.iter().map(|r| r.min).fold(0.8, f64::min).max(0.01);
    let x = |v: f64| LEFT + (v.max(least) / least).ln() / (most / least).ln() * (WIDTH - LEFT - 70.0);
    let mut engines: Vec<&str> = Vec::new();
    rows.iter().for_each(|r| {
        if !engines.contains(&r.backend.as_str()) {
            engines.push(&r.backend);
        }
    });
    let height = 40.0 + ROW * rows.len() as f64;
    let mut s = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <title>Time against native: 1 is native speed, logarithmic</title>\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    for tick in [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0].into_iter().filter(|t| *t <= most) {
        let at = x(tick);
        let colour = if tick == 1.0 { "#000" } else { "#ddd" };
        // Writing to a String cannot fail.
        let _ = writeln!(
            s,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"22\" y2=\"{height}\" stroke=\"{colour}\"/><text x=\"{at:.1}\" y=\"16\" text-anchor=\"middle\">{tick}</text>"
        );
    }
    for (n, r) in rows.iter().enumerate() {
        let y = 28.0 + ROW * n as f64;
        let colour = COLOURS[engines.iter().position(|e| *e == r.backend).unwrap_or(0) % COLOURS.len()];
        let (from, to) = (x(1.0).min(x(r.median)), x(1.0).max(x(r.median)));
        let middle = y + 6.0;
        let _ = writeln!(
            s,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{} · {}</text><rect x=\"{from:.1}\" y=\"{y}\" width=\"{:.1}\" height=\"12\" fill=\"{colour}\"/>\
             <line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle}\" y2=\"{middle}\" stroke=\"#000\"/><text x=\"{:.1}\" y=\"{:.1}\">{:.2}</text>",
            LEFT - 8.0,
            y + 10.0,
            r.program,
            r.backend,
            to - from,
            x(r.min),
            x(r.max),
            x(r.max).max(to) + 6.0,
            y + 10.0,
            r.median
        );
    }
    s.push_str("</svg>\n");
    s
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_begin_at_native_speed_and_grow_with_the_ratio() {
        let rows = [Ratios::new("a", "bt", &[(1.0, 2.0)]), Ratios::new("b", "interp", &[(1.0, 40.0)])];
        let s = svg(&rows);
        let width = |n: usize| -> f64 {
            let bar = s.match_indices("height=\"12\"").nth(n).expect("a bar").0;
            let text = &s[..bar];
            let at = text.rfind("width=\"").expect("a width") + 7;
            text[at..].split('"').next().expect("a number").parse().expect("a number")
        };
        // Logarithmic: ln 40 / ln 2.
        assert!((width(1) / width(0) - 40f64.ln() / 2f64.ln()).abs() < 0.01, "{s}");
        assert!(s.contains("a · bt") && s.contains(">40.00<") && s.ends_with("</svg>\n"));
    }
}
