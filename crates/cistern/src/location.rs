//! How a person says where a bucket is: a URL, and beside it what does not look well in one.

use clap::Args;

/// What reaches an S3 store, besides its URL.
#[derive(Args, Clone, Debug, Default)]
pub struct Reach {
    /// S3 endpoint, for stores other than AWS; http:// must be written out, TLS is the default
    #[arg(long, value_name = "URL")]
    endpoint: Option<String>,
    /// S3 region
    #[arg(long, value_name = "NAME")]
    region: Option<String>,
    /// Address the bucket in the path, not in the host name (most stores other than AWS)
    #[arg(long)]
    path_style: bool,
}

impl Reach {
    /// `url` with all of it as parameters.
    pub fn url(&self, url: &str) -> String {
        let mut url = url.to_owned();
        let mut add = |key: &str, value: &str| {
            url.push(if url.contains('?') { '&' } else { '?' });
            url.push_str(&format!("{key}={value}"));
        };
        if let Some(endpoint) = &self.endpoint {
            add("endpoint", endpoint);
        }
        if let Some(region) = &self.region {
            add("region", region);
        }
        if self.path_style {
            add("path_style", "true");
        }
        url
    }
}
