//! Writes the company dump to standard output: `company-dump [scale] [seed]`.

use std::io::{BufWriter, Write};

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let scale = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(1.0);
    let seed = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(42);
    let mut out = BufWriter::new(std::io::stdout().lock());
    acceptance::company::dump(&mut out, scale, seed)?;
    out.flush()
}
