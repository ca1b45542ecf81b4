// A picture file -> the numbers that the model takes: what the image processor of the checkpoint does, in the browser.
// The library's own processor resizes through a canvas, which filters otherwise than Pillow and torchvision do.

const LUMINANCE = [0.299, 0.587, 0.114]; // ITU-R BT.601

/** Decode a PNG or JPEG (Blob) to grey, 0..1: {values: Float32Array of height x width, height, width}. */
export async function readGrey(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, width, height); // RGBA
  const values = new Float32Array(width * height);
  for (let pixel = 0; pixel < values.length; pixel++) {
    const [red, green, blue] = data.subarray(4 * pixel, 4 * pixel + 3);
    values[pixel] = (LUMINANCE[0] * red + LUMINANCE[1] * green + LUMINANCE[2] * blue) / 255;
  }
  return { values, height, width };
}

/** For each of `after` pixels: the first of the `before` pixels that it is made of, and their weights. */
function triangleFilter(before, after) {
  const scale = before / after;
  const support = Math.max(scale, 1); // wider than one pixel where the picture shrinks: antialiased
  return Array.from({ length: after }, (_, index) => {
    const centre = (index + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - support + 0.5), 0);
    const last = Math.min(Math.trunc(centre + support + 0.5), before);
    const weights = [];
    for (let pixel = first; pixel < last; pixel++) {
      weights.push(Math.max(0, 1 - Math.abs((pixel + 0.5 - centre) / support)));
    }
    const sum = weights.reduce((one, other) => one + other, 0);
    return { first, weights: weights.map((weight) => weight / sum) };
  });
}

/** Resize the whole picture to height x width: bilinear, antialiased, as Pillow and torchvision do. */
export function resize({ values, height, width }, newHeight, newWidth) {
  const columns = triangleFilter(width, newWidth);
  const narrow = new Float32Array(height * newWidth);
  for (let y = 0; y < height; y++) {
    columns.forEach(({ first, weights }, x) => {
      narrow[y * newWidth + x] = weights.reduce((sum, weight, k) => sum + weight * values[y * width + first + k], 0);
    });
  }
  const rows = triangleFilter(height, newHeight);
  const resized = new Float32Array(newHeight * newWidth);
  rows.forEach(({ first, weights }, y) => {
    for (let x = 0; x < newWidth; x++) {
      resized[y * newWidth + x] = weights.reduce((sum, weight, k) => sum + weight * narrow[(first + k) * newWidth + x], 0);
    }
  });
  return { values: resized, height: newHeight, width: newWidth };
}

/** Grey 0..1 -> normalised channels, one after the other: Float32Array of image_mean.length x height x width. */
export function normalise({ values }, { image_mean: mean, image_std: std }) {
  const channels = new Float32Array(mean.length * values.length);
  mean.forEach((level, channel) => {
    values.forEach((value, pixel) => {
      channels[channel * values.length + pixel] = (value - level) / std[channel];
    });
  });
  return channels;
}
