// The page: load the exported classifier from this server, and answer about a picture.

import { AutoModelForImageClassification, Tensor, env, pipeline } from "@huggingface/transformers";
import { normalise, readGrey, resize } from "./radiograph.js";

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.useBrowserCache = false;
env.localModelPath = "./models/"; // a path: where it is a URL, the library's pipelines miss the image processor
env.backends.onnx.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", location.href).href;
env.backends.onnx.wasm.numThreads = 1; // more need headers that not every static server sends

const name = new URLSearchParams(location.search).get("model") ?? "classifier";
const dtype = new URLSearchParams(location.search).get("dtype") ?? "fp32"; // "q8": model_quantized.onnx
const options = { dtype, device: "wasm" };

const processor = await (await fetch(`${env.localModelPath}${name}/preprocessor_config.json`)).json();
const model = await AutoModelForImageClassification.from_pretrained(name, options);

function probabilities(logits) {
  if (model.config.problem_type === "multi_label_classification") {
    return logits.map((logit) => 1 / (1 + Math.exp(-logit)));
  }
  const powers = logits.map((logit) => Math.exp(logit - Math.max(...logits)));
  const sum = powers.reduce((one, other) => one + other, 0);
  return powers.map((power) => power / sum);
}

/** Label -> probability for a picture file (Blob). */
async function classify(blob) {
  const { height, width } = processor.size;
  const pixels = normalise(resize(await readGrey(blob), height, width), processor);
  const shape = [1, processor.image_mean.length, height, width];
  const { logits } = await model({ pixel_values: new Tensor("float32", pixels, shape) });
  const found = probabilities(Array.from(logits.data));
  return Object.fromEntries(found.map((value, index) => [model.config.id2label[index], value]));
}

/** The same through the library's own pipeline, whose processor resizes in its own way. */
async function classifyByPipeline(url) {
  const classifier = await pipeline("image-classification", name, options);
  const found = await classifier(url, { top_k: Object.keys(model.config.id2label).length });
  return Object.fromEntries(found.map(({ label, score }) => [label, score]));
}

document.getElementById("picture").addEventListener("change", async ({ target }) => {
  const found = await classify(target.files[0]);
  const rows = Object.entries(found).map(([label, value]) => {
    const row = document.createElement("tr");
    row.append(...[label, value.toFixed(3)].map((text) => Object.assign(document.createElement("td"), { textContent: text })));
    return row;
  });
  document.getElementById("answer").replaceChildren(...rows);
  document.getElementById("state").textContent = "Research use only, not for clinical use.";
});

window.spcxr = { classify: async (url) => classify(await (await fetch(url)).blob()), classifyByPipeline };
document.getElementById("picture").disabled = false;
document.getElementById("state").textContent = "Ready.";
